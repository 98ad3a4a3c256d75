"""Tar shards: read at random without unpacking, shared by processes, refused when they are damaged."""

import io
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nfzoo.data.tar import shards
from nfzoo.data.tar.headers import Member, list_members
from nfzoo.data.tar.shards import TarShards
from nfzoo.errors import DataError
from nfzoo.evaluate import open_labelled
from nfzoo.transforms.decode import open_image
from tests.support.pictures import check_source, picture, write_shard, write_tar


def content(images: TarShards, index: int) -> bytes:
    return images[index][0].read()


def test_shards_keep_the_laws(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", {"0": 0, "1": 2})
    write_shard(tmp_path / "b.tar", {"0": 1, "1": 0, "2": 2}, seed=1)
    images = TarShards.index([tmp_path / "a.tar", tmp_path / "b.tar"])
    check_source(images)
    assert images.labels.tolist() == [0, 2, 1, 0, 2]
    assert images.classes == ("0", "1", "2")
    for i, seed in enumerate((0, 1, 1000, 1001, 1002)):
        assert content(images, i) == picture(seed)
    assert images.name(3) == f"{tmp_path / 'b.tar'}, 1.png"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_image_is_what_tarfile_reads(tmp_path: Path, format: int) -> None:
    long = "a" * 90
    members = [
        ("plain.jpg", picture(0, "jpg")),
        ("plain.cls", b"1"),
        ("folder/sub/one.JPEG", picture(1, "jpg")),
        ("folder/sub/one.json", b'{"label": 2, "name": "x"}'),
        ("folder/sub/one.txt", b"a caption"),
        (f"{long}/{'b' * 60}.webp", picture(2, "webp")),
        (f"{long}/{'b' * 60}.cls", b" 3\n"),
        ("readme.md", b"no image"),
        ("._plain.jpg", b"left by another system"),
        ("both.png", picture(3)),
        ("both.json", b'{"label": 9}'),
        ("both.cls", b"4"),
    ]
    if format != tarfile.USTAR_FORMAT:
        members += [(f"{'ü' * 150}.png", picture(4)), (f"{'ü' * 150}.cls", b"0" * 600)]
    path = write_tar(tmp_path / "x.tar", members, format)
    images = TarShards.index([path])
    with tarfile.open(path) as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    names = [images.name(i).partition(", ")[2] for i in range(len(images))]
    assert names == [n for n, _ in members if n.lower().endswith((".jpg", ".jpeg", ".webp", ".png")) and n[:2] != "._"]
    assert [content(images, i) for i in range(len(images))] == [found[name] for name in names]
    assert images.labels.tolist() == [1, 2, 3, 4, 0][: len(names)]


def test_a_subset_of_what_gnu_tar_writes(tmp_path: Path) -> None:
    """Folders, links and times of a real tree; the program is wherever a POSIX system is."""
    import shutil
    import subprocess

    if shutil.which("tar") is None:
        pytest.skip("needs the program tar")
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    for i in range(3):
        (tree / "deep" / f"{i}.png").write_bytes(picture(i))
        (tree / "deep" / f"{i}.cls").write_text(f"{i}\n")
    (tree / "link.png").symlink_to("deep/0.png")
    subprocess.run(["tar", "-cf", str(tmp_path / "x.tar"), "-C", str(tree), "."], check=True)
    images = TarShards.index([tmp_path / "x.tar"])
    assert sorted(images.labels.tolist()) == [0, 1, 2]
    assert all(content(images, i) == picture(int(images.labels[i])) for i in range(3))


def test_class_names_lie_beside_the_shards_or_one_folder_up(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "train" / "0.tar", {"a": 0, "b": 1})
    assert TarShards.index([shard]).classes == ("0", "1")
    (tmp_path / "classes.txt").write_text("cat\nsea lion\nünder\n\n", encoding="utf-8")
    assert TarShards.index([shard]).classes == ("cat", "sea lion", "ünder")
    (tmp_path / "train" / "classes.txt").write_text("dog\ncow\n")
    assert TarShards.index([shard]).classes == ("dog", "cow")
    assert TarShards.index([shard], ("x", "y")).classes == ("x", "y")
    for text in ("dog\n", "dog\ndog\n", "dog\n\ncow\n", ""):
        (tmp_path / "train" / "classes.txt").write_text(text)
        with pytest.raises(DataError, match=r"beyond the 1 classes|must name every class once"):
            TarShards.index([shard])


def test_labels_without_names_are_the_numbers_of_a_models_outputs(tmp_path: Path) -> None:
    write_shard(tmp_path / "pets" / "val" / "0.tar", {"a": 0, "b": 2})
    write_shard(tmp_path / "pets" / "train" / "0.tar", {"a": 0, "b": 1}, seed=1)
    labels = ("ant", "bee", "cat", "dog")
    found = open_labelled(str(tmp_path / "pets"), 4, labels)
    assert (found.dataset, found.split, found.matched_by) == ("pets", "val", "numbers")
    assert found.images.labels.tolist() == [0, 2]
    with pytest.raises(DataError, match="no classes of the model"):
        open_labelled(str(tmp_path / "pets"), 2, labels[:2])
    (tmp_path / "pets" / "classes.txt").write_text("dog\ncat\nant\n")
    named = open_labelled(str(tmp_path / "pets"), 4, labels)
    assert named.matched_by == "labels"
    assert named.images.labels.tolist() == [3, 0]


# -- shared by processes


def read_all(images: TarShards, queue: multiprocessing.Queue) -> None:
    queue.put([content(images, i) for i in range(len(images))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_the_index_and_open_files(tmp_path: Path, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    images = TarShards.index([write_shard(tmp_path / f"{k}.tar", {"a": 0, "b": 1}, seed=k) for k in range(3)])
    expected = [content(images, i) for i in range(6)]  # opens the files before the fork
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    count = 2 if method == "fork" else 1  # another one to start imports torch
    others = [context.Process(target=read_all, args=(images, queue)) for _ in range(count)]
    for other in others:
        other.start()
    assert [content(images, i) for i in range(6)] == expected
    assert [queue.get(timeout=60) for _ in others] == [expected] * count
    for other in others:
        other.join()


def test_pickles(tmp_path: Path) -> None:
    images = TarShards.index([write_shard(tmp_path / "0.tar", {"a": 0, "b": 1})]).subset([1])
    again = pickle.loads(pickle.dumps(images))
    assert content(again, 0) == content(images, 0)
    assert again.labels.tolist() == [1]


def test_few_files_stay_open(tmp_path: Path) -> None:
    paths = [write_shard(tmp_path / f"{k:03}.tar", {"a": 0}) for k in range(shards._OPEN_FILES + 20)]
    images = TarShards.index(paths)
    for i in range(len(images)):
        content(images, i)
    links = Path("/proc/self/fd")
    if not links.is_dir():
        pytest.skip("needs /proc to count open files")
    mine = [link for link in links.iterdir() if os.path.lexists(link) and str(tmp_path) in os.readlink(link)]
    assert len(mine) == shards._OPEN_FILES


def test_systems_without_pread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_shard(tmp_path / "0.tar", {"a": 0, "b": 1})
    expected = [content(TarShards.index([path]), i) for i in range(2)]
    monkeypatch.delattr(os, "pread")
    images = TarShards.index([path])
    assert [content(images, i) for i in (1, 0)] == expected[::-1]


# -- what cannot be read


PNG = picture(0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", PNG)], r"'a\.png' in .* has no label; .* 'a\.cls'"),
        ([("a.png", PNG), ("a.cls", b"cat")], r"'a\.cls' in .* holds 'cat' where a class number"),
        ([("a.png", PNG), ("a.cls", b"1.5")], "holds '1.5' where a class number"),
        ([("a.png", PNG), ("a.cls", b"-1")], "holds '-1' where a class number from 0"),
        ([("a.png", PNG), ("a.cls", b"")], "holds '' where a class number"),
        ([("a.png", PNG), ("a.cls", b"9" * 30)], "where a class number"),
        ([("a.png", PNG), ("a.cls", b"\xff\xfe")], "where a class number"),
        ([("a.png", PNG), ("a.json", b'{"class": 1}')], "where a class number from 0 on is expected, under 'label'"),
        ([("a.png", PNG), ("a.json", b'{"label": true}')], "under 'label'"),
        ([("a.png", PNG), ("a.json", b"[" * 10_000)], "under 'label'"),
        ([("a.png", PNG), ("a.cls", b"0" * ((1 << 20) + 1))], "1,048,577 bytes long, too long for a label"),
        ([("a.cls", b"0")], r"'a\.cls' and no image 'a\.jpg'"),
        ([("a.png", PNG), ("a.cls", b"0"), ("a.jpg", PNG)], r"'a\.png' and 'a\.jpg', both for the key 'a'"),
        ([("a.png", PNG), ("a.cls", b"0"), ("a.cls", b"0")], r"'a\.cls' and 'a\.cls', both for the key 'a'"),
        ([("v.1.png", PNG), ("v.1.cls", b"0"), ("v.2.png", PNG)], r"both for the key 'v'.* up to its first dot"),
        ([("readme.txt", b"")], "holds no images; expected are members"),
        ([], "holds no images"),
    ],
)
def test_bad_members_are_named(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=message) as caught:
        TarShards.index([path])
    assert str(path) in str(caught.value)


def test_a_label_beyond_the_classes_is_named(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.tar", {"a": 0, "b": 7})
    with pytest.raises(DataError, match=r"'b\.png' in .* has label 7, beyond the 3 classes"):
        TarShards.index([path], ("x", "y", "z"))


def overwrite(at: int, text: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + text + data[at + len(text) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (overwrite(0, b"b"), "is no tar file"),
        (overwrite(3072, b"z"), "damaged at byte 3,072"),
        (lambda data: b"", "is no tar file"),
        (lambda data: b"text", "is no tar file"),
        (lambda data: PNG, "is no tar file"),
    ],
)
def test_what_is_no_tar_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = write_shard(tmp_path / "x.tar", {"a": 0, "b": 1})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        TarShards.index([path])
    assert str(path) in str(caught.value)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.tar", {"a": 0, "b": 1})
    data = path.read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512  # the end mark starts there
    for length in [*range(0, end, 256), end]:
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match="cut off" if length >= 512 else "no tar file"):
            TarShards.index([path])
    path.write_bytes(data[: end + 512])
    assert len(TarShards.index([path])) == 2


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.zst", "x.TAR.BZ2"])
def test_compressed_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"is compressed.*decompress it to a \.tar"):
        TarShards.index([tmp_path / name])


def test_missing_and_changed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.tar' cannot be read: No such file"):
        TarShards.index([tmp_path / "none.tar"])
    with pytest.raises(DataError, match="cannot be read"):
        TarShards.index([tmp_path])
    with pytest.raises(DataError, match="no tar files"):
        TarShards.index([])
    path = write_shard(tmp_path / "x.tar", {"a": 0, "b": 1})
    images = TarShards.index([path])
    write_shard(path, {"a": 0, "b": 1, "c": 2})
    with pytest.raises(DataError, match=r"x\.tar' changed after it was indexed"):
        images[0]
    path.unlink()
    with pytest.raises(DataError, match=r"x\.tar, a\.png cannot be read: No such file"):
        images[0]


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.png", PNG[:60]), ("a.cls", b"0")])
    images = TarShards.index([path])
    with pytest.raises(DataError, match=r"x\.tar, a\.png cannot be decoded"):
        open_image(images[0][0])


# -- members


def members(path: Path) -> list[Member]:
    with path.open("rb") as file:
        return list(list_members(file, str(path)))


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
    data = path.read_bytes()
    found = members(path)
    assert [(m.name, m.offset, m.size, data[m.offset : m.offset + m.size]) for m in found] == expected
    assert len(found) == 5


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
    assert members(path) == [Member("a", 1536, len(content))]


@pytest.mark.parametrize("record", [b"junk", b"0 a=b\n", b"99999 a", b"11 size=-1\n", b"9 a b c\n\n"])
@pytest.mark.parametrize("first", [True, False])
def test_damaged_extended_headers_are_refused(tmp_path: Path, record: bytes, first: bool) -> None:
    extended = tarfile.TarInfo("x")
    extended.type, extended.size = tarfile.XHDTYPE, len(record)
    before = b"" if first else tarfile.TarInfo("a").tobuf(tarfile.USTAR_FORMAT)
    path = tmp_path / "x.tar"
    path.write_bytes(before + extended.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + bytes(1024))
    with pytest.raises(DataError, match="is no tar file" if first else "is damaged at byte 512"):
        members(path)


@pytest.mark.parametrize("size", [-1, -(10**6)])
def test_a_negative_size_does_not_lead_back(tmp_path: Path, size: int) -> None:
    record = f" size={size}\n".encode()
    record = str(len(record) + 2).encode() + record
    extended, member = tarfile.TarInfo("x"), tarfile.TarInfo("b")
    extended.type, extended.size = tarfile.XHDTYPE, len(record)
    blocks = [tarfile.TarInfo("a"), extended, record.ljust(512, b"\0"), member]
    path = tmp_path / "x.tar"
    data = b"".join(b if isinstance(b, bytes) else b.tobuf(tarfile.USTAR_FORMAT) for b in blocks)
    path.write_bytes(data + bytes(1024))
    with pytest.raises(DataError, match="is damaged at byte"):
        members(path)


def test_a_damaged_header_does_not_end_the_list(tmp_path: Path) -> None:
    """Python's own reader ends there without an error."""
    path = write_tar(
        tmp_path / "x.tar", [(f"{i}{'n' * 120 * i}", bytes(600 * i)) for i in range(3)], tarfile.GNU_FORMAT
    )
    data = path.read_bytes()
    assert len(members(path)) == 3
    headers = [0, *(at for at in range(512, len(data), 512) if data[at + 257 : at + 262] == b"ustar")]
    assert len(headers) == 5
    for header in headers:
        for at in (0, 99, 124, 148, 156, 260, 345):
            path.write_bytes(overwrite(header + at, bytes([data[header + at] ^ 0x55]))(data))
            with pytest.raises(DataError, match="is damaged at byte" if header else "is no tar file"):
                members(path)


def test_a_great_label_needs_many_images(tmp_path: Path) -> None:
    """A number alone would make two thousand million classes."""
    for label, message in (
        (b"2147483646", "1 images have at most 65,536 classes"),
        (b"65536", "label 65,536; 1 images"),
    ):
        path = write_tar(tmp_path / "x.tar", [("a.jpg", picture(0)), ("a.cls", label)])
        with pytest.raises(DataError, match=message):
            TarShards.index([path])
    path = write_tar(tmp_path / "x.tar", [("a.jpg", picture(0)), ("a.cls", b"65535")])
    assert len(TarShards.index([path]).classes) == 65536


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a")
    member.type = tarfile.GNUTYPE_SPARSE
    path = tmp_path / "x.tar"
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match="sparse members; make it again without `tar --sparse`"):
        members(path)


def test_members_that_systems_add_are_passed_over(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "train.tar", {"a": 0, "b": 1})
    with tarfile.open(shard, "a") as tar:
        for name in ("__MACOSX/a.jpg", "photos/@eaDir/b.jpg/SYNOPHOTO_THUMB_M.jpg", ".trash/c.jpg"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    assert len(TarShards.index([shard])) == 2
    assert len(TarShards.unlabelled([shard], tmp_path)) == 2
