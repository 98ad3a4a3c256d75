"""Safetensors files: written so that equal tensors are equal files, and read with errors that name the file.

A model may lie in several files, its shards. An index then names the file of each tensor, as transformers and
`huggingface_hub.save_torch_state_dict` write it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nfzoo.errors import CheckpointError, shown
from nfzoo.files import check_regular, open_regular, read_json

logger = logging.getLogger("nfzoo")

FRAMEWORK = {"format": "pt"}
"""Metadata that accelerate and transformers require of a file of torch's tensors."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of numbers that a model computes in; eight bits need scales, which no model here has."""

MOST_TENSORS = 1 << 16
"""Tensors of one file or model, many times those of the largest; comparing names with every model takes time."""

CHECKSUM = "crc32"
"""Key in a file's metadata of its checksum; see `checksum`."""

DESCRIPTION = "nfzoo"
"""Key in a file's metadata of the model's description."""

_LENGTH = 8  # bytes before the header, which state its length
_BLOCK = 1 << 22  # bytes that are read at a time


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, with_checksum: bool = True
) -> None:
    """Write a safetensors file with `FRAMEWORK` in its metadata.

    Args:
        with_checksum: also the `CHECKSUM` of its tensors, which `open_tensors` compares.

    Raises:
        OSError: if writing fails.
    """
    notes = {**FRAMEWORK, **(metadata or {}), **({CHECKSUM: "0" * 8} if with_checksum else {})}
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=notes)
    except SafetensorError as error:
        raise OSError(f"could not write {path.name}: {error}") from error
    if with_checksum:
        notes[CHECKSUM] = checksum(path, notes)
    _finish_metadata(path, notes)


def _finish_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Write metadata of the same length, sorted: safetensors orders them at random, and equal files should be equal."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "safetensors writes the same compact JSON"
        file.seek(_LENGTH)
        file.write(text.ljust(length))


def checksum(path: Path, metadata: Mapping[str, str]) -> str:
    """Return the CRC-32 of the tensors' bytes in a safetensors file and of the model's description, as 8 hex digits.

    Names and shapes of tensors, which are in the header too, are compared with the description's.
    """
    value = 0
    with open_regular(path) as file:
        file.seek(int.from_bytes(file.read(_LENGTH), "little"), 1)
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    text = metadata.get(DESCRIPTION, "").encode("utf-8", "surrogatepass")
    return f"{zlib.crc32(text, value):08x}"


def stated_checksum(path: Path) -> str | None:
    """Return the checksum in the metadata of a safetensors file, which is not compared here; `None` without one."""
    with open_weights(path) as file:
        return (file.metadata() or {}).get(CHECKSUM)


def has_checksum(path: Path, metadata: Mapping[str, str]) -> bool:
    """Compare a file with the checksum in its metadata; return whether there is one.

    Raises:
        CheckpointError: if they differ.
    """
    stated = metadata.get(CHECKSUM)
    if stated is None:
        return False
    if re.fullmatch("[0-9a-f]{8}", stated) is None:
        raise CheckpointError(f"the metadata of {path} state the {CHECKSUM} {shown(stated)}, which is none")
    try:
        actual = checksum(path, metadata)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if actual != stated:
        raise CheckpointError(
            f"{path} is damaged: tensors and description have the CRC-32 {actual}, and had {stated} when they were "
            f"saved; fetch or save it again (a program that changes them has to leave {CHECKSUM!r} out of the metadata)"
        )
    return True


def warn_unchecked(*files: Path) -> None:
    """Warn of files of which nothing shows whether their weights are those that were saved."""
    if files:
        more = f" (and {len(files) - 1} more)" if files[1:] else ""
        logger.warning(
            "%s%s: there is no checksum, so a damaged weight would not be noticed; save_pretrained writes one",
            *(files[0], more),
        )


def open_weights(path: Path, device: str = "cpu") -> Any:
    """Open a safetensors file; raise a `CheckpointError` if it is missing or damaged."""
    try:
        check_regular(path)
        return safe_open(path, framework="pt", device=device)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}); fetch or save it again"
        ) from error


class Weights:
    """The tensors of one safetensors file, or of several shards; a `CheckpointError` for more than `MOST_TENSORS`.

    Attributes:
        files: the opened files, by path.
        shapes: the shape of each tensor.
        unchecked: the files without a checksum of their tensors.
    """

    def __init__(self, files: Mapping[Path, Any]) -> None:
        self.files = files
        self.unchecked = [path for path, file in files.items() if not has_checksum(path, file.metadata() or {})]
        self._file = {key: file for file in files.values() for key in file.keys()}  # noqa: SIM118
        if len(self._file) > MOST_TENSORS:
            count = f"{len(self._file):,} tensors"
            raise CheckpointError(f"{next(iter(files))} holds {count}; no model has more than {MOST_TENSORS:,}")
        self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key, file in self._file.items()}

    def get_tensor(self, key: str) -> Tensor:
        """Read one tensor into memory of its own.

        What safetensors returns on a CPU is a part of the mapped file, at any multiple of four bytes. The last bits of
        a matrix product depend on the address, and so they would depend on the length of the file's header.
        """
        return self._file[key].get_tensor(key).clone()


@contextlib.contextmanager
def open_tensors(path: Path, device: str = "cpu") -> Iterator[Weights]:
    """Open a safetensors file, or the shards of an index (`.json`), and compare their checksums.

    Raises:
        CheckpointError: if a file is missing or damaged, or if the shards do not hold what the index says.
    """
    index = read_index(path) if path.suffix == ".json" else None
    names = [path.name] if index is None else sorted(set(index.values()))
    with contextlib.ExitStack() as stack:
        paths = [path.with_name(name) for name in names]
        weights = Weights({p: stack.enter_context(open_weights(p, device)) for p in paths})
        if index is not None:
            _check_shards(weights, index, path)
        yield weights


def read_index(path: Path) -> dict[str, str]:
    """Return the name of the shard of each tensor: the `weight_map` of an index.

    Raises:
        CheckpointError: if the file is no index, names a tensor twice, or names a file that does not lie beside it.
    """
    try:
        fields = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no index of shards: {error}") from error
    index = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path} is no index of shards: it needs a 'weight_map' from tensors to files")
    for key, name in index.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} has {key!r} in {name!r}, which is no name of a .safetensors file beside the index"
            )
    return index


def _check_shards(weights: Weights, index: Mapping[str, str], path: Path) -> None:
    """Raise a `CheckpointError` unless each shard holds exactly the tensors that the index has in it."""
    for shard, file in weights.files.items():
        keys = set(file.keys())
        for key in sorted(keys | {key for key, name in index.items() if name == shard.name}):
            if key not in keys:
                raise CheckpointError(f"{shard} lacks {key!r}, which {path.name} has in it; fetch or save both again")
            if index.get(key) != shard.name:
                other = index.get(key, "no file")
                raise CheckpointError(
                    f"{shard} holds {key!r}, which {path.name} has in {other}; fetch or save both again"
                )
