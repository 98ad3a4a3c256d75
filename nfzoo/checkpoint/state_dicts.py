"""State dicts in files of torch: plain ones, and those that trainers wrap. Nothing in a file is executed."""

from __future__ import annotations

import argparse
import io
import logging
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from nfzoo.checkpoint.weight_files import FLOATS, MOST_TENSORS, open_tensors, warn_unchecked
from nfzoo.errors import CheckpointError, ConversionError
from nfzoo.files import open_regular

logger = logging.getLogger("nfzoo")

_AVERAGE = re.compile(r"(?<![a-z])(ema|shadow|averaged?)(?![a-z])|EMA|average_model", re.ASCII)
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")  # also within names
MOST_SHARING = 2  # times the file's bytes that its tensors may take, as one storage can stand in many places
MOST_PICKLE = 4 << 20  # bytes of the pickle in an archive; one of 2,000 weights, averages and momenta takes 1 MB
MOST_READS = 1 << 21  # of a pickle that is no member of an archive; an instruction takes one or two
FIRST_SAFE = "2.10"
"""The first torch whose reader of weights alone a hostile pickle does not corrupt (CVE-2026-24747)."""

# What torch's reader calls, and what takes memory or time beyond the file's bytes: a number of bytes, slow codecs.
_COSTLY = re.compile(rb"(?:__builtin__|builtins)\nbytearray\n|[\0\x04\x08](?i:idna|punycode)")
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # how torch's files began before they were zip archives


class StateDict(Mapping[str, Tensor]):
    """Tensors of a file by their names in the model; from safetensors each is read when it is asked for.

    Attributes:
        shapes: of the tensors, which need not be read for them.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
        anchors: Collection[str],
    ) -> None:
        if len(shapes) > MOST_TENSORS:
            raise ConversionError(f"{path} holds {len(shapes):,} tensors; no model has more than {MOST_TENSORS:,}")
        plain = {_WRAPPERS.sub("", key): key for key in shapes}
        if len(plain) < len(shapes):
            name = next(key for key in shapes if plain[_WRAPPERS.sub("", key)] != key)
            raise ConversionError(
                f"{path} holds {name!r} with and without a wrapper; save the state_dict() of one model"
            )
        prefix = _prefix(path, plain, anchors)
        self._read = read
        self._stored = {name.removeprefix(prefix): key for name, key in plain.items() if name.startswith(prefix)}
        self.shapes = {name: shapes[key] for name, key in self._stored.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self._read(self._stored[key])

    def __contains__(self, key: object) -> bool:  # Mapping's own would read the tensor
        return key in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def check_values(params: Mapping[str, Tensor]) -> None:
    """Raise a `ConversionError` unless all are finite numbers of one floating-point type that networks run in."""
    first, dtype = next((name, value.dtype) for name, value in params.items())
    for name, value in params.items():
        if value.dtype not in FLOATS:
            known = ", ".join(map(_short, FLOATS))
            raise ConversionError(f"{name} is of type {_short(value.dtype)}, none of {known}")
        if value.dtype != dtype:
            raise ConversionError(
                f"{name} is of type {_short(value.dtype)}, and {first} of {_short(dtype)}; save the weights in one type"
            )
        if not torch.isfinite(value).all():
            raise ConversionError(f"{name} holds numbers that are not finite")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_torch_file(path: Path) -> bool:
    """Return whether torch wrote this file, whatever its suffix, by its first bytes and its members."""
    try:
        with open_regular(path) as file:
            if file.read(len(_LEGACY)) == _LEGACY:
                return True
            if not zipfile.is_zipfile(file):
                return False
            with zipfile.ZipFile(file) as archive:
                return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


@contextmanager
def open_state_dict(
    path: Path, anchors: Collection[str], *, allow_pickle: bool = False, hashed: bool = False
) -> Iterator[StateDict]:
    """Open the state dict of a model in a file that a trainer or `torch.save` wrote.

    A trainer's file holds more than one dictionary, and prefixes from wrappers: `module.` of DDP, `_orig_mod.` of
    torch.compile, `model.` of Lightning. Of weights and their moving average the average is taken, as timm does; a
    warning says so.

    Args:
        path: a `.safetensors` file, the index (`.json`) of several, or a file that torch wrote.
        anchors: names of a tensor that every such model has, in each layout that is looked for.
        allow_pickle: read a file that torch wrote, which is a pickle.
        hashed: whether the file was compared with a hash already; otherwise a warning says if it has no checksum.

    Raises:
        ConversionError: for a pickle that was not asked for, or under a torch that is not safe from one; for a file
            that is damaged, holds objects other than tensors and plain values, or holds no model or more than one.

    Source: timm 1.0, models/_helpers.py; Lightning 2, docs on checkpoints; torchvision's references.
    """
    if path.suffix in (".safetensors", ".json"):
        with ExitStack() as stack:
            try:
                weights = stack.enter_context(open_tensors(path))
            except CheckpointError as error:
                raise ConversionError(str(error)) from error
            if not hashed:
                warn_unchecked(*weights.unchecked)
            yield StateDict(path, weights.shapes, weights.get_tensor, anchors)
        return
    check_pickles(path, allow_pickle)
    if not hashed:
        warn_unchecked(path)
    state = _state_of(path, _unpickle(path), anchors)
    _check_tensors(path, state)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    yield StateDict(path, shapes, state.__getitem__, anchors)


def _unpickle(path: Path) -> object:
    # Plain values that trainers keep beside the weights: the options of the run, a metric as a scalar of numpy.
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64", "bool")]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    try:
        _check_archive(path)
        with (
            torch.serialization.safe_globals(
                [argparse.Namespace, np.dtype, *kinds, *((scalar, name) for name in names)]
            ),
            _Counted(io.FileIO(path)) as file,
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle makes the reader raise almost anything
        text = " ".join(str(error).split())
        foreign = re.search(r"GLOBAL ([\w.]+)", text)
        reason = f"it holds an object of {foreign[1]}" if foreign else text[:300] or type(error).__name__
        raise ConversionError(
            f"{path} cannot be read as weights alone: {reason}; save model.state_dict() in the program that wrote it"
        ) from error


def check_pickles(source: object, allow_pickle: bool) -> None:
    """Raise a `ConversionError` unless torch's pickles may be read, and this torch is safe from them."""
    remedy = "convert it to safetensors where you trust it"
    if not allow_pickle:
        raise ConversionError(
            f"{source} is a pickle of torch's, which is read on request alone: {remedy}, or pass allow_pickle=True "
            "(--allow-pickle)"
        )
    if TorchVersion(torch.__version__) < FIRST_SAFE:
        raise ConversionError(
            f"{source} is a pickle, and torch {torch.__version__} is not safe from hostile ones (CVE-2026-24747): "
            f"{remedy}, or install torch {FIRST_SAFE} or newer"
        )


class _Counted(io.BufferedReader):
    """Limits how much torch's reader does for a pickle of many short instructions."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MOST_READS:
            raise ValueError(f"its pickle takes more than {MOST_READS} reads")
        return super().read(size)


def _check_archive(path: Path) -> None:
    """Raise a `ValueError` for what torch's reader does not look at.

    Checksums have to be those of the content. Nothing may be packed or stand in two places, so that an archive takes no
    more memory than it has bytes. A pickle may ask for no more than that either.
    """
    with open_regular(path) as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                pickles = _checked_pickles(archive, path.stat().st_size)
        else:
            file.seek(0)
            pickles = [file.read(4 * MOST_PICKLE)]
    if any(map(_COSTLY.search, pickles)):
        raise ValueError("its pickle calls what takes memory or time beyond its size")


def _checked_pickles(archive: zipfile.ZipFile, size: int) -> list[bytes]:
    """Return the pickles of an archive of `size` bytes; raise a `ValueError` for one that is packed or damaged."""
    members = archive.infolist()
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise ValueError("it is a TorchScript program")
    packed = next((m.filename for m in members if m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1), None)
    if packed is not None:
        raise ValueError(f"{packed!r} in it is packed or encrypted, as torch packs nothing")
    if sum(member.file_size for member in members) > size or len(set(archive.namelist())) < len(members):
        raise ValueError("one place or name in it stands for many")
    damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged!r} does not have the checksum that is stated")
    pickles = [member for member in members if member.filename.endswith("data.pkl")]
    long = next((member for member in pickles if member.file_size > MOST_PICKLE), None)
    if long is not None:
        raise ValueError(f"{long.filename!r} takes {long.file_size:,} bytes, more than {MOST_PICKLE:,}")
    return [archive.read(member) for member in pickles]


def _check_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise a `ConversionError` for tensors that are no plain ones, or together far larger than the file.

    A tensor of stride 0, and many tensors of one storage, take no room in the file.
    """
    total, limit = 0, MOST_SHARING * path.stat().st_size
    for name, value in state.items():
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided
        if not plain or value.device.type != "cpu" or value.is_nested or value.is_quantized:
            kind = "a nested tensor" if value.is_nested else f"of layout {value.layout} on {value.device}"
            raise ConversionError(f"{name!r} in {path} is {kind}, no plain tensor; save plain ones on the CPU")
        total += value.numel() * value.element_size()
        if total > limit:
            raise ConversionError(
                f"the tensors of {path} up to {name!r} take {total:,} bytes, over {MOST_SHARING} times the file's; "
                "save contiguous copies of them"
            )


def _state_of(path: Path, loaded: object, anchors: Collection[str]) -> Mapping[str, Tensor]:
    """Return the state dict, or the one entry of a trainer's dictionary that is one."""
    if _is_state(loaded):
        return loaded  # pyright: ignore[reportReturnType]
    entries = loaded if isinstance(loaded, dict) else {}
    states = {
        key: value
        for key, value in entries.items()
        if _is_state(value) and _prefixes([_WRAPPERS.sub("", name) for name in value], anchors)
    }
    averages = [key for key in states if _AVERAGE.search(str(key))]
    if len(states) == 2 and len(averages) == 1:
        logger.warning("%s holds weights and their moving average; %r, the average, is taken", path, averages[0])
        return states[averages[0]]
    if len(states) != 1:
        found = f"the models {', '.join(map(repr, states))}" if states else "no state dict of an NF-network"
        raise ConversionError(f"{path} holds {found}; save the state_dict() of one model alone")
    key, state = next(iter(states.items()))
    others = [name for name in _names(entries, set()) if name != key and _AVERAGE.search(name)]
    if others and not averages:
        logger.warning(
            "%s holds a moving average too (%r), in a form that is not read; %r is taken", path, others[0], key
        )
    return state


def _names(value: object, seen: set[int], depth: int = 4) -> list[str]:
    """List the keys of nested dictionaries, of each once, without those of state dicts."""
    if not isinstance(value, dict) or id(value) in seen or _is_state(value) or not depth:
        return []
    seen.add(id(value))
    return [name for key, inner in value.items() for name in (str(key), *_names(inner, seen, depth - 1))]


def _is_state(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _prefixes(names: Collection[str], anchors: Collection[str]) -> list[str]:
    """Return what stands before the names of each model among `names`."""
    ends = {name.removesuffix(anchor) for name in names for anchor in anchors if name.endswith(anchor)}
    return sorted(prefix for prefix in ends if not prefix or prefix.endswith("."))


def _prefix(path: Path, names: Collection[str], anchors: Collection[str]) -> str:
    prefixes = _prefixes(names, anchors)
    if len(prefixes) > 1:
        raise ConversionError(
            f"{path} holds {len(prefixes)} models, under {', '.join(map(repr, prefixes))}; save the state_dict() of one"
        )
    prefix = prefixes[0] if prefixes else ""
    beside = [name for name in names if not name.startswith(prefix)]
    if beside:
        logger.warning(
            "%s holds %d tensors beside the model, such as %r, which are left out", path, len(beside), beside[0]
        )
    return prefix
