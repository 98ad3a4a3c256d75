"""Tensors in one safetensors file for each process: written together, and read by any number of processes.

torch's distributed checkpoint writes the files, `shard-00001-model-00001-of-00001.safetensors` and so on. The metadata
of each tells where its parts lie in the full tensors. No file is a pickle, unlike in torch's own format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nfzoo.errors import CheckpointError
from nfzoo.files import check_regular, parse_json

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PATTERN = "shard-*.safetensors"
_PLACES = "DCP_SHARDING_INFO"  # torch's key in the metadata of a file


def save_shards(folder: Path | None, tensors: Mapping[str, Tensor], group: ProcessGroup) -> None:
    """Write what this process holds of each tensor; all processes of the group call this together.

    Args:
        folder: an empty folder on a file system that all processes share. The first process alone names it; if it
            passes `None`, nothing is written.
        tensors: a `DTensor` by its shards, any other tensor by one of the processes.
        group: of all processes, with a backend for the CPU.

    Raises:
        OSError: in all processes if one could not write, and in the first if not all parts are in its folder.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    named: list[str | None] = [None if folder is None else str(folder)]
    dist.broadcast_object_list(named, src=0, group=group)
    if named[0] is None:
        return
    try:
        save(
            dict(tensors), storage_writer=HuggingFaceStorageWriter(named[0], save_distributed=True), process_group=group
        )
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"process {rank} could not write its part: {cause}") from error
    if folder is not None:
        sizes = {name: tensor.numel() for name, tensor in tensors.items()}
        if _written(folder) != sizes:
            raise OSError(f"parts of other processes are not in {folder}; name a folder that all processes share")


def shard_names(names: Iterable[str]) -> list[str]:
    """Return those names of files that `save_shards` gives."""
    return [name for name in names if fnmatch(name, _PATTERN)]


def load_full(files: Iterable[Path], prefix: str) -> dict[str, Tensor]:
    """Read full tensors from the parts of all processes, under names without `prefix`, which all of them begin with.

    Args:
        files: those of one checkpoint. Others may lie beside them.

    Raises:
        CheckpointError: if a file is damaged or missing, or if they do not hold every number of every tensor.
    """
    files = list(files)
    tensors: dict[str, Tensor] = {}
    try:
        with ExitStack() as stack:
            opened = {path: _open(path, stack) for path in files}
            parts = [part for path in files for part in _parts(path, opened[path]) if part.name.startswith(prefix)]
            sizes = _sizes(parts)
            for part in parts:
                tensor = opened[part.path].get_tensor(part.name)
                if part.name not in tensors:
                    tensors[part.name] = tensor.new_empty(sizes[part.name])
                place = tuple(slice(start, start + n) for start, n in zip(part.offsets, part.shape, strict=True))
                tensors[part.name][place] = tensor
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, RuntimeError) as error:
        folder = files[0].parent if files else "a checkpoint"
        raise CheckpointError(f"a part of {folder} is damaged ({error}); remove it to use an earlier one") from error
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


class _Part(NamedTuple):
    """A tensor's numbers in one file, and where they begin in the full tensor."""

    path: Path
    name: str
    offsets: Sequence[int]
    shape: Sequence[int]


def _open(path: Path, stack: ExitStack) -> Any:
    check_regular(path)
    return stack.enter_context(safe_open(path, framework="pt"))


def _parts(path: Path, file: Any) -> list[_Part]:
    places = parse_json((file.metadata() or {})[_PLACES])
    shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return [_Part(path, name, places[name]["saved_offsets"], shape) for name, shape in shapes.items()]


def _sizes(parts: Iterable[_Part]) -> dict[str, list[int]]:
    """Return the shape of each full tensor; raise `ValueError` if some of its numbers are in no part, or in two."""
    sizes: dict[str, list[int]] = {}
    held: Counter[str] = Counter()
    for part in parts:
        ends = [start + n for start, n in zip(part.offsets, part.shape, strict=True)]
        sizes[part.name] = [max(pair) for pair in zip(sizes.get(part.name, ends), ends, strict=True)]
        held[part.name] += prod(part.shape)
    for name, size in sizes.items():
        if held[name] != prod(size):
            raise ValueError(f"its files hold {held[name]} of {prod(size)} numbers of {name}")
    return sizes


def _written(folder: Path) -> dict[str, int]:
    """Return how many numbers of each tensor the files in a folder hold."""
    held: Counter[str] = Counter()
    with ExitStack() as stack:
        for path in folder.glob(_PATTERN):
            for part in _parts(path, _open(path, stack)):
                held[part.name] += prod(part.shape)
    return dict(held)
