"""Small data sets of noise in every form that is read, and what holds of every source of images."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import struct
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from nfzoo.data.images import Images
from nfzoo.data.source import open_all


def write_images(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


@functools.cache
def few_digits() -> str:
    """Return a folder of 200 digits, 20 of each class: a training run over them takes half a second.

    The first process of a session makes it, in the folder of `tests/conftest.py`; those that it starts find it there.
    """
    folder = Path(os.environ["NFZOO_TESTS"]) / "few-digits"
    if not folder.exists():
        source = open_all("digits")
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            for label in range(10):
                (Path(scratch) / "digits" / str(label)).mkdir(parents=True)
                for i in np.flatnonzero(source.labels == label)[:20]:
                    source[int(i)][0].save(Path(scratch) / "digits" / str(label) / f"{i:04}.png")
            with contextlib.suppress(OSError):  # another worker was first
                (Path(scratch) / "digits").rename(folder)
    return str(folder)


def picture(seed: int, ending: str = "png") -> bytes:
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    kind = {"png": "PNG", "webp": "WEBP"}.get(ending, "JPEG")
    Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def bomb_png(width: int, height: int) -> bytes:
    """Return a PNG file of a kilobyte whose header states a size of which decoders make gigabytes."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1 << 20))),
    ]
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in (*chunks, (b"IEND", b"")):
        file += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return file


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shard(path: Path, labels: dict[str, int], seed: int = 0) -> Path:
    """One image for each key, with its label."""
    members = []
    for i, (key, label) in enumerate(labels.items()):
        members += [(f"{key}.png", picture(1000 * seed + i)), (f"{key}.cls", str(label).encode())]
    return write_tar(path, members)


def check_source(images: Images) -> None:
    """What holds of every source: for tests of the others too."""
    assert images.labels.dtype == np.int64
    assert images.labels.shape == (len(images),)
    assert [images[i][1] for i in range(len(images))] == images.labels.tolist()
    chosen = [len(images) - 1, 0, 2]
    part = images.subset(chosen)
    assert [part.name(i) for i in range(3)] == [images.name(i) for i in chosen]
    assert [part[i][1] for i in range(3)] == [images[i][1] for i in chosen]
    assert part.classes == images.classes
    again = part.subset(np.array([2]))
    assert (again.name(0), len(again)) == (images.name(2), 1)
    turned = images.relabelled(range(len(images.classes))[::-1])
    assert turned.labels.tolist() == [len(images.classes) - 1 - label for label in images.labels.tolist()]
    assert turned[0][1] == turned.labels[0]
    assert turned.name(0) == images.name(0)


def png(width: int, height: int, *, bits: int = 1, colour: int = 0) -> bytes:
    """A black PNG file of any size, which Pillow would take long to write; `colour` is the format's colour type."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    row = bytes(1 + (width * bits * channels + 7) // 8)
    rows = max(1, (1 << 20) // len(row))
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(row * min(rows, height - top)) for top in range(0, height, rows))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed + packer.flush()) + chunk(b"IEND", b"")
