"""The members of tar files, and reading at a position."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import NamedTuple

from nfzoo.errors import DataError

LONGEST_TEXT = 1 << 20
"""Bytes of a label file or of an extended header; more is damage."""

_REGULAR, _NO_CONTENT = (b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"5", b"6")
_BLOCK = 512  # POSIX.1-1988, ustar: headers and contents fill whole blocks
_LOCK = threading.Lock()


class Member(NamedTuple):
    """A file inside a tar file: its name, first byte and size, and its first bytes, which came with the header."""

    name: str
    offset: int
    size: int
    beginning: bytes


def open_to_read(path: str) -> int:
    """A file descriptor for `read_at`."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes from `offset` on; threads and forked processes may share the descriptor."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _LOCK:  # Windows has no such call, and no fork
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)


def members(descriptor: int, path: str, length: int) -> Iterator[Member]:
    """The regular files of an open tar file of `length` bytes, in its order, from ustar, GNU and pax headers.

    Raises:
        DataError: for a file that is no tar file, damaged, or without the end mark, so that no cut goes unnoticed.

    Source: POSIX.1-2001, pax; GNU tar, tar.h.
    """
    position = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        blocks = read_at(descriptor, 2 * _BLOCK, position)  # a label comes with its header
        header = blocks[:_BLOCK]
        if len(header) < _BLOCK and position:
            raise _cut_off(path)
        if header and not header.strip(b"\0"):
            return
        if len(header) < _BLOCK or _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            kind = "no tar file" if not position else f"damaged at byte {position:,}"
            raise DataError(f"{path!r} is {kind}; make it again with `tar -cf`, or fetch it again")
        size = _number(header[124:136]) or 0
        kind = header[156:157]
        if kind in _REGULAR and long_size is not None:
            size = long_size
        elif kind in _NO_CONTENT:  # a link may tell the size of what it points to
            size = 0
        start = position + _BLOCK
        position = start + -(-size // _BLOCK) * _BLOCK
        if start + size > length:
            raise _cut_off(path)
        if kind in (b"x", b"L"):
            if size > LONGEST_TEXT:
                raise DataError(f"{path!r} is damaged: an extended header of {size:,} bytes")
            content = read_at(descriptor, size, start)
            if kind == b"L":
                long_name = _text(content)
            else:
                records = _pax(content, path)
                if any(name.startswith("GNU.sparse") for name in records):
                    raise DataError(f"{path!r} holds sparse members; make it again without `tar --sparse`")
                long_name = records.get("path", long_name)
                if "size" in records:
                    long_size = _whole(records["size"], path)
            continue
        if kind == b"S":
            raise DataError(f"{path!r} holds sparse members; make it again without `tar --sparse`")
        if kind in (b"g", b"K"):
            continue
        name, long_name, long_size = long_name, None, None
        if kind in _REGULAR:
            if name is None:
                prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
                name = f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])
            yield Member(name, start, size, blocks[_BLOCK:])


def _number(field: bytes) -> int | None:
    """Octal digits, or a binary number after a byte 0x80; `None` for what is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return None


def _pax(content: bytes, path: str) -> dict[str, str]:
    """The records of an extended header: the length of the record, a space, `NAME=VALUE` and a line feed."""
    records = {}
    while content.strip(b"\0"):
        try:
            length = int(content.partition(b" ")[0])
            name, equals, value = content[:length].partition(b" ")[2].partition(b"=")
            if not equals or not value.endswith(b"\n"):
                raise ValueError
        except ValueError as error:
            raise DataError(f"{path!r} is damaged: an extended header that cannot be read") from error
        records[_text(name)] = os.fsdecode(value[:-1])
        content = content[length:]
    return records


def _whole(text: str, path: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise DataError(f"{path!r} is damaged: an extended header gives the size {text!r}")
    return int(text)


def _text(field: bytes) -> str:
    return os.fsdecode(field.partition(b"\0")[0])


def _cut_off(path: str) -> DataError:
    return DataError(f"{path!r} is cut off: it ends before the end mark of a tar file; copy or make it again")
