"""Headers of tar files from strangers: read forwards, in time in proportion to the file, or refused."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from nfzoo.data.tar.headers import list_members
from nfzoo.errors import DataError
from tests.support.loops import each


def header(kind: bytes, size: int | bytes = 0, name: str = "a.jpg") -> bytes:
    """A header; of a size in bytes, those that stand in its field."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size if isinstance(size, int) else 0
    block = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    if isinstance(size, bytes):
        block[124:136] = size.ljust(12, b"\0")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body)
    while length != len(str(length)) + len(body):
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def extended(content: bytes, kind: bytes = b"x") -> bytes:
    return header(kind, len(content)) + content + bytes(-len(content) % 512)


FILE = header(b"0")
NEGATIVE = b"-0000001000"

# What a file begins with, after a good member -> what the refusal says.
HOSTILE: dict[str, tuple[bytes, str]] = {
    **{
        f"back, of kind {kind!r}": (header(kind, NEGATIVE), "is damaged")
        for kind in (b"0", b"1", b"5", b"Z", b"L", b"x")
    },
    "far ahead": (header(b"Z", b"\x80" + b"\x7f" * 11), "is cut off|is damaged"),
    "5,000 digits": (extended(record("size", "9" * 5000)) + FILE, "is damaged"),
    "900 digits": (extended(record("size", "9" * 900)) + FILE, "is cut off"),
    "digits alone": (extended(b"1" * 60_000) + FILE, "is damaged"),
    "short records": (extended(b"2 " * 30_000 + b"a=") + FILE, "is damaged"),
    "a megabyte": (extended(record("comment", "x" * (1 << 20))) + FILE, "is damaged"),
    "global ones": ((extended(record("comment", "x" * 400), b"g") + FILE) * 30, "is damaged"),
    "one in another": (header(b"x") * 3000 + FILE, "is damaged"),
    "names of names": (header(b"L") * 3000 + FILE, "is damaged"),
    "a map": (extended(record("GNU.sparse.map", "0,1")) + FILE, "sparse members"),
    "a map in the content": (
        extended(record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0")) + FILE + b"1" * 512,
        "sparse members",
    ),
    "a map without an end": (header(b"S")[:482] + b"\1" + header(b"S")[483:], "is damaged|is cut off"),
}


@each("case", HOSTILE)
@pytest.mark.timeout(60)
def test_hostile_headers_are_refused(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "x.tar"
    path.write_bytes(FILE + content + bytes(1024))
    with path.open("rb") as file, pytest.raises(DataError, match=message):
        list(list_members(file, str(path)))


def test_extended_headers_that_programs_write(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    usual = record("path", "ü" * 300 + ".jpg") + record("mtime", "1.5") + record("SCHILY.xattr.user.a", "x=y\nz")
    path.write_bytes(extended(record("comment", "c" * 40), b"g") + extended(usual) + FILE + bytes(1024))
    with path.open("rb") as file:
        (member,) = list_members(file, str(path))
    assert member.name == "ü" * 300 + ".jpg"
