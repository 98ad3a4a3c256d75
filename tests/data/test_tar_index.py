"""Members of tar files, against Python's own reader; damage is in `test_shards.py`."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfzoo.data.tar_index import Member, members, open_to_read, read_at
from nfzoo.errors import DataError


def read(path: Path) -> Iterator[tuple[Member, bytes]]:
    descriptor = open_to_read(str(path))
    try:
        for member in members(descriptor, str(path), path.stat().st_size):
            yield member, read_at(descriptor, member.size, member.offset)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path: Path, format: int) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=format, pax_headers={"comment": "for all members"}) as tar:
        for name, size in (("empty", 0), ("block", 512), ("d/more", 513), ("l" * 99, 3), (f"{'p' * 90}/{'n' * 60}", 5)):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = size, 1.5 if format == tarfile.PAX_FORMAT else 1
            tar.addfile(member, io.BytesIO(os.urandom(size)))
            for kind, mark in ((tarfile.DIRTYPE, "dir"), (tarfile.SYMTYPE, "soft"), (tarfile.LNKTYPE, "hard")):
                other = tarfile.TarInfo(f"{mark}-{size}")
                other.type, other.linkname, other.size = kind, "empty", 700  # a size, and no content
                tar.addfile(other)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size, tar.extractfile(m).read()) for m in tar if m.isreg()]  # type: ignore[union-attr]
    found = list(read(path))
    assert [(m.name, m.offset, m.size, content) for m, content in found] == expected
    assert len(found) == 5
    for member, content in found:
        assert member.beginning[: member.size] == content[:512]


def test_a_size_in_an_extended_header_counts(tmp_path: Path) -> None:
    """Files above 8 GiB have their size there; the header's own field then holds nothing of use."""
    content = b"content of thirty bytes or so."
    header = bytearray(tarfile.TarInfo("a").tobuf(tarfile.USTAR_FORMAT))
    record = f"11 size={len(content)}\n".encode()
    assert len(record) == 11
    extended = tarfile.TarInfo("x")
    extended.type, extended.size = tarfile.XHDTYPE, len(record)
    data = extended.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + header + content.ljust(512, b"\0")
    path = tmp_path / "x.tar"
    path.write_bytes(data + bytes(1024))
    assert [(m.name, c) for m, c in read(path)] == [("a", content)]


@pytest.mark.parametrize("record", [b"junk", b"0 a=b\n", b"99999 a", b"11 size=-1\n", b"9 a b c\n\n"])
def test_damaged_extended_headers_are_named(tmp_path: Path, record: bytes) -> None:
    extended = tarfile.TarInfo("x")
    extended.type, extended.size = tarfile.XHDTYPE, len(record)
    path = tmp_path / "x.tar"
    path.write_bytes(extended.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + bytes(1024))
    with pytest.raises(DataError, match=r"x\.tar' is damaged: an extended header"):
        list(read(path))


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a")
    member.type = tarfile.GNUTYPE_SPARSE
    path = tmp_path / "x.tar"
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match="sparse members; make it again without `tar --sparse`"):
        list(read(path))
