"""Write a Haiku tree as a pickle, one array at a time, for any numpy since 1.16 and any Python since 3.0."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nfzoo.checkpoint.atomic import replaced
from nfzoo.config import ModelConfig
from nfzoo.conversion.haiku import haiku_array, haiku_names


def write_haiku(path: str | Path, cfg: ModelConfig, params: Mapping[str, Tensor]) -> Path:
    """Write `{module: {parameter: numpy array}}` of a model, whole or not at all; `pickle` and `dill` load it.

    The standard pickler would name numpy's functions by modules of numpy 2, which older versions lack. It would also
    hold a second copy of every array. Source: protocol 3, as in `pickletools`.
    """
    modules: dict[str, list[tuple[str, str]]] = {}
    for key, (module, name) in haiku_names(cfg).items():
        modules.setdefault(module, []).append((name, key))
    with replaced(path) as scratch, scratch.open("wb") as file:
        memo: dict[str, int] = {}
        file.write(b"\x80\x03}(")
        for module, names in modules.items():
            file.write(_text(module) + b"}(")
            for name, key in names:
                file.write(_text(name))
                _write_array(file, haiku_array(key, params[key]), memo)
            file.write(b"u")
        file.write(b"u.")
    return Path(path)


def _write_array(file: BinaryIO, array: NDArray, memo: dict[str, int]) -> None:
    """Write what `numpy.ndarray.__reduce__` gives: `_reconstruct(ndarray, (0,), b"b")`, then its state."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    shape = b"(" + b"".join(_int(n) for n in array.shape) + b"t"
    file.write(_stored(memo, "numpy.core.multiarray._reconstruct", b"cnumpy.core.multiarray\n_reconstruct\n"))
    file.write(_stored(memo, "numpy.ndarray", b"cnumpy\nndarray\n"))
    file.write(b"K\x00\x85C\x01b\x87R(K\x01" + shape)
    file.write(_stored(memo, array.dtype.name, _dtype(array.dtype)))
    file.write(b"\x89B" + struct.pack("<I", little.nbytes))
    file.write(little.data)
    file.write(b"tb")


def _dtype(dtype: np.dtype) -> bytes:
    """Return the code of `numpy.dtype("f4", False, True)`, then its state, which says little-endian."""
    name = _text(f"f{dtype.itemsize}")
    return b"cnumpy\ndtype\n" + name + b"\x89\x88\x87R(K\x03" + _text("<") + b"NNN" + 2 * _int(-1) + b"K\x00tb"


def _stored(memo: dict[str, int], name: str, code: bytes) -> bytes:
    """Return `code` where `name` is met first, and a look into the memo after that."""
    if name in memo:
        return b"h" + bytes([memo[name]])
    memo[name] = len(memo)
    return code + b"q" + bytes([memo[name]])


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(n: int) -> bytes:
    return b"J" + struct.pack("<i", n)
