"""Open files of Haiku parameters: pickles and `.npz` archives, trees and flattened ones. Nothing in them is executed.

An archive is read without unpickling, and no more of it is unpacked than it declares.

Source: the `.npy` format of numpy, NEP 1; the archive is a plain zip file.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nfzoo.checkpoint.weight_files import MOST_TENSORS
from nfzoo.conversion.arrays import (
    BFLOAT16,
    FLOATS,
    Element,
    LazyArray,
    RefusedError,
    arranged,
    byte_count,
    checked_shape,
)
from nfzoo.conversion.haiku import canonical
from nfzoo.conversion.pickle_reader import read_pickle
from nfzoo.errors import ConversionError
from nfzoo.files import nearest_path, open_regular

_KEYSTR = re.compile(r"\['([^']*)'\]\['([^']*)'\]")  # jax.tree_util.keystr of a path
MOST_RATIO = 20  # unpacked bytes to one of the archive; trained weights hardly pack at all, 2.3 if they were bfloat16
MOST_DIRECTORY = 16 << 20  # bytes of the list of files; 3,000 arrays take 400,000
LONGEST_HEADER = 4096
_END = b"PK\x05\x06"
_END_64 = b"PK\x06\x07"

# What numpy writes for a plain array, and nothing that would have to be evaluated.
_HEADER = re.compile(
    rb"\{'descr': '([^']{1,20})', 'fortran_order': (True|False), 'shape': \(((?:\d{1,15}, ?)*(?:\d{1,15})?)\), ?\} *\n"
)


def read_npz(file: BinaryIO, size: int) -> dict[str, LazyArray]:
    """Return `{name: LazyArray}` of an archive of `size` bytes, whose arrays are read later, from the same file.

    Raises:
        RefusedError: for anything that is not an archive of floating-point arrays, with the reason.
    """
    _check_directory(file, size)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, EOFError) as error:
        raise RefusedError(f"the archive is damaged: {error}") from None
    members = archive.infolist()
    unpacked = sum(member.file_size for member in members)
    if unpacked > MOST_RATIO * size:
        raise RefusedError(f"the archive declares {unpacked} bytes, more than {MOST_RATIO} times the {size} it has")
    arrays: dict[str, LazyArray] = {}
    for member in members:
        name = member.filename.removesuffix(".npy")
        if name == member.filename:
            raise RefusedError(f"{name[:200]!r} in the archive is no .npy array")
        if name in arrays:
            raise RefusedError(f"the archive holds {name[:200]!r} twice")
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise RefusedError(f"{name[:200]!r} in the archive is encrypted, or packed as numpy packs nothing")
        arrays[name] = _lazy_array(archive, member, name)
    return arrays


def _check_directory(file: BinaryIO, size: int) -> None:
    """Raise unless the list of files, all of which `zipfile` keeps in memory, has a sensible length."""
    start = max(0, size - (1 << 16) - 22)
    file.seek(start)
    tail = file.read(size - start)
    at = len(tail) - 22  # zipfile, too, tries the plain end before it looks for one with a comment
    if at < 0 or tail[at : at + 4] != _END or tail[-2:] != b"\0\0":
        at = tail.rfind(_END)
    if at < 0 or len(tail) - at < 22:
        raise RefusedError("the archive is cut off: it lacks its end")
    if tail[max(0, at - 20) : at].startswith(_END_64):
        raise RefusedError("the archive is of the kind for more than 4 GiB or 65,535 files")
    length = struct.unpack("<I", tail[at + 12 : at + 16])[0]
    if length > MOST_DIRECTORY:
        raise RefusedError(f"the archive's list of files takes {length} bytes, more than {MOST_DIRECTORY}")


def _lazy_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> LazyArray:
    shown = name[:200]
    head = _unpacked(archive, member, LONGEST_HEADER)
    if head[:8] not in (b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00"):
        raise RefusedError(f"{shown!r} in the archive does not begin like a .npy array")
    form = "<H" if head[6] == 1 else "<I"
    begin = 8 + struct.calcsize(form)
    if len(head) < begin:
        raise RefusedError(f"{shown!r} in the archive is cut off")
    begin, length = begin, struct.unpack(form, head[8:begin])[0]
    match = _HEADER.fullmatch(head[begin : begin + length]) if length <= LONGEST_HEADER - 12 else None
    if match is None:
        raise RefusedError(f"{shown!r} in the archive has a header that numpy writes for no array of numbers")
    kind = match[1].decode("latin1")
    if "O" in kind:
        raise RefusedError(f"{shown!r} in the archive is an array of dtype object, which can hold anything")
    # numpy has no bfloat16: it saves one as two bytes of nothing.
    element = Element(BFLOAT16) if kind in ("<V2", "|V2") else Element(kind[1:], kind[0])
    if element.name not in (*FLOATS, BFLOAT16) or (element.order not in "<>"):
        raise RefusedError(f"{shown!r} in the archive is of dtype {kind!r}, none of {', '.join(FLOATS)} and bfloat16")
    shape = checked_shape(tuple(int(n) for n in match[3].decode().split(",") if n.strip()))
    order = "F" if match[2] == b"True" else "C"
    count, offset = byte_count(shape, element), begin + length
    if member.file_size != offset + count:
        held = member.file_size - offset
        raise RefusedError(f"{shown!r} in the archive declares {count} bytes of numbers, and it comes with {held}")

    def read() -> NDArray:
        raw = _unpacked(archive, member, None)
        return arranged(element.decode(np.frombuffer(raw, np.uint8)[offset:].copy()), shape, order)

    return LazyArray(shape, element.dtype, read)


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int | None) -> bytes:
    """Return the first `limit` bytes of a file of the archive, or all of them after its checksum was compared."""
    shown = member.filename[:200]
    try:
        with archive.open(member) as stream:
            if limit is not None:
                return stream.read(limit)
            data = stream.read(member.file_size)
            stream.read(1)  # the checksum is compared at the end
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        raise RefusedError(f"{shown!r} in the archive is damaged: {error}") from None
    if len(data) != member.file_size:
        raise RefusedError(f"{shown!r} in the archive is cut off")
    return data


class Source(NamedTuple):
    """An open file of parameters.

    Attributes:
        path: the file.
        form: `pickle, protocol 4` or `npz`.
        arrays: canonical name -> array, to be read while the file is open.
    """

    path: Path
    form: str
    arrays: dict[str, LazyArray]


@contextmanager
def open_source(path: str | Path) -> Iterator[Source]:
    """Open a file of Haiku parameters. Nothing in it is executed; a `ConversionError` of the block names the file.

    Raises:
        ConversionError: for what is no pickle or archive of floating-point arrays under the names of parameters, with
            the reason.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder without a model" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        near = "" if path.exists() else nearest_path(path)
        remedy = near or "; give DeepMind's file, or a folder of nfzoo's or timm's"
        raise ConversionError(f"{path} {what}{remedy}")
    size = path.stat().st_size
    with open_regular(path) as file:
        try:
            magic = file.read(4)
            if magic[:1] == b"\x80":
                pickled = read_pickle(file, size)
                form, tree = f"pickle, protocol {pickled.protocol}", pickled.tree
            elif magic[:2] == b"PK":
                form, tree = "npz", read_npz(file, size)
            else:
                what = "it is empty" if not size else "it is neither a pickle of protocol 2 to 5 nor an .npz archive"
                raise RefusedError(what)
            yield Source(path, form, _flat(tree))
        except ConversionError as error:
            raise ConversionError(f"{path}: {error}") from error


def _flat(tree: dict[Any, Any]) -> dict[str, LazyArray]:
    """Return arrays under canonical names, from `{module: {name: array}}` or from `{path: array}`."""
    arrays: dict[str, LazyArray] = {}
    for key, value in tree.items():
        parts = key if isinstance(key, tuple) else (key,)
        if len(parts) == 1 and (match := _KEYSTR.fullmatch(parts[0])):
            parts = match.groups()
        for name, array in value.items() if isinstance(value, dict) else [(None, value)]:
            names = parts if name is None else (*parts, *(name if isinstance(name, tuple) else (name,)))
            path = canonical(*names)
            if path in arrays:
                raise RefusedError(f"{path!r} comes twice, in two spellings")
            arrays[path] = array
            if len(arrays) > MOST_TENSORS:
                raise RefusedError(f"it holds more than {MOST_TENSORS:,} arrays, as no model does")
    if not arrays:
        raise RefusedError("it holds no arrays")
    return arrays
