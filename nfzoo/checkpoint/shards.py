"""Tensors in one safetensors file for each process: written together, and read by any number of processes.

torch's distributed checkpoint writes the files, `shard-00001-model-00001-of-00001.safetensors` and so on. The metadata
of each tells where its parts lie in the full tensors. No file is a pickle, unlike in torch's own format.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nfzoo.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PATTERN = "shard-*.safetensors"


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


def is_sharded(folder: Path) -> bool:
    """Return whether `save_shards` wrote this folder."""
    return next(folder.glob(_PATTERN), None) is not None


def load_full(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Read full tensors from the parts of all processes, under names without `prefix`, which all of them begin with.

    Raises:
        CheckpointError: if a file is damaged or missing.
    """
    try:
        metadata = _metadata(folder)
        tensors = {
            name: torch.empty(of.size, dtype=of.properties.dtype)
            for name, of in metadata.state_dict_metadata.items()
            if name.startswith(prefix)
        }
        with ExitStack() as stack:
            paths = {part.relative_path for part in metadata.storage_data.values()}
            files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
            for index, part in metadata.storage_data.items():
                if index.fqn in tensors:
                    place = tuple(slice(start, start + n) for start, n in zip(index.offset, part.shape, strict=True))
                    tensors[index.fqn][place] = files[part.relative_path].get_tensor(index.fqn)
    except (SafetensorError, OSError, LookupError, ValueError) as error:
        raise CheckpointError(f"a part of {folder} is damaged ({error}); remove it to use an earlier one") from error
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _written(folder: Path) -> dict[str, int]:
    """Return how many numbers of each tensor the files in a folder hold."""
    found = _metadata(folder).state_dict_metadata.items()
    return {name: sum(prod(chunk.sizes) for chunk in of.chunks) for name, of in found}


def _metadata(folder: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder)).read_metadata()
