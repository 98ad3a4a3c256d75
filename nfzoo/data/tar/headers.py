"""Headers of tar files: the place of each member, from files that strangers may have made."""

from __future__ import annotations

import os
import re
import tarfile
import threading
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from nfzoo.errors import DataError

_MAX_EXTENDED = 1 << 16  # bytes of an extended header; names and attributes take some hundreds
_MAX_SHARED = 1 << 12  # bytes of all global headers of a file; that of git takes 512
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_RECORD = re.compile(rb"([1-9]\d{0,5}) ([^=\n]+)=")
_LONG_NUMBER = re.compile(rb"\d{1000}")  # tarfile looks for the end of a number from each of its digits
_SPARSE = "{!r} holds sparse members; make it again without `tar --sparse`"
_LOCK = threading.Lock()


class Member(NamedTuple):
    """A file inside a tar file: its name, first byte and number of bytes."""

    name: str
    offset: int
    size: int


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Read bytes without moving the position of the file."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _LOCK:  # Windows has neither pread nor fork
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)


class _Headers:
    """A tar file as `tarfile` may read its headers: forwards, within the file, and extended headers that are whole.

    `tarfile` follows sizes backwards and into the void, and takes quadratic time for extended headers that are none.
    """

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.file, self.path = file, path
        self.length = os.fstat(file.fileno()).st_size
        self.shared = 0  # bytes of global headers, which every member has a share in
        self.kind = b""  # of the extended header whose content comes next

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, position: int) -> None:
        if not self.file.tell() <= position < self.length:
            raise tarfile.ReadError("a member ends where none can")
        self.file.seek(position)

    def read(self, size: int) -> bytes:
        content = self.file.read(size) if 0 <= size <= _MAX_EXTENDED else b""
        if len(content) != size:
            raise tarfile.ReadError("a header is cut off or too long")
        if self.kind:
            self.shared += size if self.kind == tarfile.XGLTYPE else 0
            if self.kind in _PAX:
                self._check(content.rstrip(b"\0"))
            self.kind = b""
        elif size == tarfile.BLOCKSIZE and content[156:157] in _EXTENDED:
            self.kind = content[156:157]
        return content

    def _check(self, content: bytes) -> None:
        """Raise unless the content of an extended header is records of `length key=value`, one a line."""
        at = 0
        while match := _RECORD.match(content, at):
            at += int(match[1])
            if match[2].startswith(b"GNU.sparse."):
                raise DataError(_SPARSE.format(self.path))
            if at <= match.end() or content[at - 1 : at] != b"\n":
                break
        if at != len(content) or _LONG_NUMBER.search(content) or self.shared > _MAX_SHARED:
            raise tarfile.ReadError("an extended header is none")


def list_members(file: BinaryIO, path: str) -> Iterator[Member]:
    """List the regular files of an open tar file, in its order.

    `tarfile` stops without an error at a damaged or missing header, so this looks for the end mark there.

    Raises:
        DataError: if the file is no tar file, is damaged, is cut off before its end mark, or has sparse members.
    """
    length = os.fstat(file.fileno()).st_size
    try:
        tar = tarfile.TarFile(fileobj=_Headers(file, path))  # type: ignore[arg-type]  # uncompressed
    except DataError:
        raise
    except (tarfile.TarError, ValueError, RecursionError) as error:
        raise DataError(f"{path!r} is no tar file; make it again with `tar -cf`, or fetch it again") from error
    while True:
        try:
            member = tar.next()
        except DataError:
            raise
        except (tarfile.TarError, ValueError, RecursionError):  # from the header after the last good member
            break
        if member is None:
            if read_at(file.fileno(), tarfile.BLOCKSIZE, tar.offset) == bytes(tarfile.BLOCKSIZE):
                return
            break
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all members
        if member.issparse():
            raise DataError(_SPARSE.format(path))
        if member.size < 0:
            tar.offset = member.offset
            break
        if member.isreg():
            if member.offset_data + member.size > length:
                break
            yield Member(member.name, member.offset_data, member.size)
    if tar.offset + tarfile.BLOCKSIZE > length:
        raise DataError(f"{path!r} is cut off: it ends before the end mark of a tar file; copy or make it again")
    raise DataError(f"{path!r} is damaged at byte {tar.offset:,}; make it again with `tar -cf`, or fetch it again")
