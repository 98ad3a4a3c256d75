"""IDX files: those of MNIST and Fashion-MNIST, whole, broken and hostile."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from nfzoo.data import idx
from nfzoo.data.source import open_all, open_held_out, open_parts, open_split
from nfzoo.errors import DataError
from nfzoo.train.run_folder import public_data

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (14, 28, 28), np.uint8)
LABELS = np.array([3, 0, 1, 2, 3, 0, 1, 2, 9, 8, 7, 6, 5, 4], np.uint8)


def content(array: np.ndarray) -> bytes:
    """An IDX file, as the page of its format describes it."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(folder: Path, *, held_out: int = 4, zipped: bool = True) -> Path:
    """Write a folder as torchvision and Debian have it."""
    folder.mkdir(parents=True)
    first = len(LABELS) - held_out
    for part, rows in (("train", slice(first)), ("t10k", slice(first, None))):
        for kind, array in (("images-idx3", PIXELS[rows]), ("labels-idx1", LABELS[rows])):
            if len(array):
                data, name = content(array), f"{part}-{kind}-ubyte"
                (folder / f"{name}{'.gz' * zipped}").write_bytes(gzip.compress(data) if zipped else data)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_parts_pixels_and_labels(tmp_path: Path, zipped: bool) -> None:
    folder = write(tmp_path / "FashionMNIST" / "raw", zipped=zipped)
    split = open_split(str(folder))
    assert split.train.classes == split.validation.classes == idx.FASHION_CLASSES
    assert split.train.labels.tolist() == LABELS[:10].tolist()
    assert split.validation.labels.tolist() == LABELS[10:].tolist()
    for i, images in ((3, split.train), (13, split.validation)):
        image, label = images[i % 10]
        np.testing.assert_array_equal(np.asarray(image), PIXELS[i])
        assert label == LABELS[i]
    everything = open_all(str(folder))
    assert [everything.name(i) for i in (0, 9, 10, 13)] == [
        "train, image 0",
        "train, image 9",
        "test, image 0",
        "test, image 3",
    ]
    np.testing.assert_array_equal(np.asarray(everything[13][0]), PIXELS[13])
    assert list(open_parts(str(folder))) == ["train", "test"]
    part = open_held_out(str(folder))
    assert (part.split, len(part.images), part.images.name(2)) == ("test", 4, "test, image 2")


def test_other_data_sets_have_numbers_as_classes(tmp_path: Path) -> None:
    split = open_split(str(write(tmp_path / "mnist")))
    assert split.train.classes == tuple("0123456789") == split.validation.classes
    alone = write(tmp_path / "alone", held_out=6)
    for file in alone.glob("t10k*"):
        file.unlink()
    split = open_split(str(alone), validation_fraction=0.5)
    assert (split.train.classes, len(split.train), len(split.validation)) == (tuple("0123"), 4, 4)


def test_other_pixels_have_another_stamp(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", zipped=False)
    before = open_split(str(folder)).train.stamp()
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1] + bytes([PIXELS[9, -1, -1] ^ 1]))
    assert open_split(str(folder)).train.stamp() != before


def test_the_name_finds_the_package_or_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(idx, "FASHION_FOLDER", tmp_path / "share" / "fashion-mnist")
    for opening in (open_split, open_all, open_held_out):
        with pytest.raises(DataError, match="`apt-get install dataset-fashion-mnist` puts it there"):
            opening("fashion-mnist")
    write(tmp_path / "share" / "fashion-mnist")
    assert open_split("fashion-mnist").train.classes == idx.FASHION_CLASSES
    assert len(open_all("fashion-mnist")) == 14
    found = open_held_out("fashion-mnist")
    assert (found.dataset, found.split) == ("fashion-mnist", "test")
    assert public_data("fashion-mnist") == "fashion-mnist"
    assert public_data(str(tmp_path / "share" / "fashion-mnist")) == "fashion-mnist"


def test_the_same_file_twice_is_read_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", zipped=True)
    for file in folder.glob("*.gz"):
        (folder / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    assert len(open_split(str(folder)).train) == 10


IMAGES = "train-images-idx3-ubyte"
HEADER = struct.pack(">HBB3I", 0, 8, 3, 10, 28, 28)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (IMAGES, b"", "is no IDX file of unsigned bytes in 3 dimension"),
        (IMAGES, b"\0\0\x0d" + HEADER[3:], "is no IDX file of unsigned bytes"),  # floats
        (IMAGES, content(LABELS), "is no IDX file of unsigned bytes in 3 dimension"),
        (IMAGES, HEADER + b"x", "promises 7,840 bytes and has only 1; fetch it anew"),
        (IMAGES, HEADER + b"x" * 7841, "promises 7,840 bytes and has more"),
        (IMAGES, struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**31, 2**31), "promises 9,903,520,314,283,042,199,192,993,792"),
        (IMAGES, struct.pack(">HBB3I", 0, 8, 3, 0, 28, 28), "is empty: its header says 0 x 28 x 28"),
        (IMAGES, content(PIXELS[:9]), "has 9 images, and 'train-labels-idx1-ubyte' 10 labels"),
        (f"{IMAGES}.gz", b"no gzip", "cannot be read"),
        (f"{IMAGES}.gz", gzip.compress(content(PIXELS[:10]))[:-9], "cannot be read"),
        (
            "t10k-labels-idx1-ubyte",
            content(np.full(4, 10, np.uint8)),
            "has the label 10; those of 10 classes are 0 to 9",
        ),
        ("t10k-labels-idx1-ubyte", None, "has the images of test alone; images and labels belong together"),
        ("kmnist-train-labels-idx1-ubyte", b"", "has files of several data sets"),
        ("test-labels-idx1-ubyte", b"", "has 't10k-labels-idx1-ubyte' and 'test-labels-idx1-ubyte'; keep one"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    folder = write(tmp_path / "fashion-mnist", zipped=False)
    if name.endswith(".gz"):
        (folder / name.removesuffix(".gz")).unlink()
    if data is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data)
    with pytest.raises(DataError, match="(?s)" + message.replace("'", ".")) as error:
        open_split(str(folder))
    assert str(folder) in str(error.value)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    (folder / f"{IMAGES}.gz").write_bytes(gzip.compress(HEADER + bytes(1 << 26)))  # 64 MiB behind 7,840 bytes
    with pytest.raises(DataError, match="has more"):
        open_split(str(folder))
