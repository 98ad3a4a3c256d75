"""State dicts in files of torch: plain ones, and those that trainers wrap. Nothing in a file is executed."""

from __future__ import annotations

import argparse
import logging
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfzoo.checkpoint.weight_files import FLOATS, open_tensors
from nfzoo.errors import CheckpointError, ConversionError

logger = logging.getLogger("nfzoo")

_AVERAGE = re.compile(r"(?<![a-z])(ema|shadow|averaged?)(?![a-z])|EMA|average_model", re.ASCII)
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")  # also within names
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
        with path.open("rb") as file:
            if file.read(len(_LEGACY)) == _LEGACY:
                return True
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


@contextmanager
def open_state_dict(path: Path, anchors: Collection[str]) -> Iterator[StateDict]:
    """Open the state dict of a model in a file that a trainer or `torch.save` wrote.

    A trainer's file holds more than one dictionary, and prefixes from wrappers: `module.` of DDP, `_orig_mod.` of
    torch.compile, `model.` of Lightning. Of weights and their moving average the average is taken, as timm does; a
    warning says so.

    Args:
        path: a `.safetensors` file, the index (`.json`) of several, or a file that torch wrote.
        anchors: names of a tensor that every such model has, in each layout that is looked for.

    Raises:
        ConversionError: for a file that is damaged, holds objects other than tensors and plain values, or holds no
            model or more than one.

    Source: timm 1.0, models/_helpers.py; Lightning 2, docs on checkpoints; torchvision's references.
    """
    if path.suffix in (".safetensors", ".json"):
        with ExitStack() as stack:
            try:
                weights = stack.enter_context(open_tensors(path))
            except CheckpointError as error:
                raise ConversionError(str(error)) from error
            yield StateDict(path, weights.shapes, weights.get_tensor, anchors)
        return
    state = _state_of(path, _unpickle(path), anchors)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    yield StateDict(path, shapes, state.__getitem__, anchors)


def _unpickle(path: Path) -> object:
    # Plain values that trainers keep beside the weights: the options of the run, a metric as a scalar of numpy.
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64", "bool")]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    _check_sums(path)
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace, np.dtype, *kinds, *((scalar, name) for name in names)]
        ):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle makes the reader raise almost anything
        text = " ".join(str(error).split())
        foreign = re.search(r"GLOBAL ([\w.]+)", text)
        if foreign is not None:
            reason = f"it holds an object of {foreign[1]}"
        elif "TorchScript" in text:
            reason = "it is a TorchScript program"
        else:
            reason = text[:300] or type(error).__name__
        raise ConversionError(
            f"{path} cannot be read as weights alone: {reason}; save model.state_dict() in the program that wrote it"
        ) from error


def _check_sums(path: Path) -> None:
    """Raise a `ConversionError` unless the checksums of a zip archive are those of its content; torch looks at none."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, EOFError) as error:
        raise ConversionError(f"{path} cannot be read as weights alone: it is damaged ({error})") from error
    if damaged is not None:
        raise ConversionError(f"{path} is damaged: {damaged!r} in it does not have the checksum that is stated")


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
    others = [name for name in _names(entries) if name != key and _AVERAGE.search(name)]
    if others and not averages:
        logger.warning(
            "%s holds a moving average too (%r), in a form that is not read; %r is taken", path, others[0], key
        )
    return state


def _names(value: object, depth: int = 4) -> list[str]:
    """List the keys of nested dictionaries, without those of state dicts."""
    if not isinstance(value, dict) or _is_state(value) or not depth:
        return []
    return [name for key, inner in value.items() for name in (str(key), *_names(inner, depth - 1))]


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
