"""Data sets of a Python program: every form of items, labels and classes, and what is refused."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from nfzoo.data.digits import Digits
from nfzoo.data.images import Images
from nfzoo.errors import ConfigError, DataError
from nfzoo.train.python.datasets import open_dataset, title_of
from nfzoo.transforms.decode import open_image
from tests.support.loops import each

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), np.uint8)
LABELS = [2, 0, 1, 1, 0, 2]
NAMES = ["cat", "dog", "fish"]


class Own(Dataset[Any]):
    """A data set of anything: items, and attributes."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pairs(images: Any = PIXELS, labels: Any = LABELS) -> list[Any]:
    return list(zip(images, labels, strict=True))


def table() -> datasets.Dataset:
    rows = {"image": [{"bytes": png(p), "path": None} for p in PIXELS], "label": LABELS}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict(rows, features=features)


def written(folder: Path) -> list[str]:
    for i, pixels in enumerate(PIXELS):
        (folder / f"{i}.png").write_bytes(png(pixels))
    return [str(folder / f"{i}.png") for i in range(len(PIXELS))]


def forms(folder: Path) -> Iterator[tuple[str, Any, list[str]]]:
    """Yield the same images and labels in every form, with the classes' names that come of it."""
    numbers = ["0", "1", "2"]
    pillow = [Image.fromarray(p) for p in PIXELS]
    tensors = [torch.from_numpy(p).permute(2, 0, 1) for p in PIXELS]
    paths = written(folder)
    yield "arrays", pairs(), numbers
    yield "pillow", pairs(pillow), numbers
    yield "lazy", pairs([Image.open(path) for path in paths]), numbers
    yield "tensors", pairs(tensors, torch.tensor(LABELS)), numbers
    yield "paths", pairs(paths, np.array(LABELS, np.uint8)), numbers
    yield "names", pairs(pillow, [NAMES[k] for k in LABELS]), NAMES
    yield "tensor data set", TensorDataset(torch.stack(tensors), torch.tensor(LABELS)), numbers
    yield "own", Own(pairs()), numbers
    yield "targets", Own(pairs(), targets=torch.tensor(LABELS), classes=NAMES), NAMES
    yield "labels", Own(pairs(), labels=np.array(LABELS), classes=tuple(NAMES)), NAMES
    changed = Own(pairs(), targets=[5 - k for k in LABELS], target_transform=lambda k: 5 - k)
    yield "target_transform", changed, numbers
    yield "synonyms", Own(pairs(), classes=[("cat", "puss"), ("dog",), ("fish",)]), ["cat, puss", "dog", "fish"]
    yield "samples", Own(pairs(pillow), samples=list(zip(paths, LABELS, strict=True)), targets=LABELS), numbers
    twice = Own(pairs([*PIXELS[::-1], *PIXELS], [*LABELS[::-1], *LABELS]), targets=[*LABELS[::-1], *LABELS])
    yield "subset", Subset(Subset(twice, range(4, 12)), range(2, 8)), numbers
    halves = [Own(pairs(PIXELS[a:b], LABELS[a:b]), classes=NAMES) for a, b in ((0, 2), (2, 6))]
    yield "parts", ConcatDataset(halves), NAMES
    yield "table", table(), NAMES
    yield "table of tensors", table().with_format("torch"), NAMES


def test_every_form_gives_the_same_images(tmp_path: Path) -> None:
    for form, dataset, classes in forms(tmp_path):
        for images in (
            (open_dataset(dataset), pickle.loads(pickle.dumps(open_dataset(dataset))))
            if form == "own"
            else (open_dataset(dataset),)
        ):
            assert images.classes == tuple(classes), form
            assert images.labels.tolist() == LABELS, form
            assert images.labels.dtype == np.int64
            for i, pixels in enumerate(PIXELS):
                source, label = images[i]
                assert label == LABELS[i], form
                assert np.array_equal(np.asarray(open_image(source)), pixels), form
            half = images.subset([4, 1])
            assert half.labels.tolist() == [0, 0]
            assert np.array_equal(np.asarray(open_image(half[0][0])), PIXELS[4]), form
            assert len({images.name(i) for i in range(len(images))}) == len(images)


def test_grey_images() -> None:
    grey = PIXELS[..., 0]
    for form in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[:, None]):
        images = open_dataset(pairs(form))
        assert np.array_equal(np.asarray(open_image(images[1][0], channels=1)), grey[1])


def test_the_programs_images_are_left_alone() -> None:
    given = [Image.fromarray(p) for p in PIXELS]
    images = open_dataset(pairs(given))
    assert str(getattr(images[2][0], "filename", "")) == "item 2 of list"
    assert not hasattr(given[2], "filename")


def test_names_of_files_and_of_data_sets(tmp_path: Path) -> None:
    paths = written(tmp_path)
    images = open_dataset(Subset(Own(pairs(), samples=list(zip(paths, LABELS, strict=True)), targets=LABELS), [3, 1]))
    assert [images.name(0), images.name(1)] == [paths[3], paths[1]]
    assert list(images.files()) == [paths[3], paths[1]]
    assert title_of(ConcatDataset([Subset(Own([]), []), Own([])])) == "Own"


def test_stamps_tell_pixels_in_memory_apart() -> None:
    other = PIXELS.copy()
    other[3, 0, 0, 0] ^= 1
    tensors = torch.from_numpy(PIXELS).permute(0, 3, 1, 2), torch.from_numpy(other).permute(0, 3, 1, 2)
    for make in (
        lambda k: pairs((PIXELS, other)[k]),
        lambda k: TensorDataset(tensors[k], torch.tensor(LABELS)),
        lambda k: Own(pairs(), data=(PIXELS, other)[k]),
    ):
        assert open_dataset(make(0)).stamp() == open_dataset(make(0)).stamp() != open_dataset(make(1)).stamp()


def test_classes_of_an_argument_and_of_the_training_images() -> None:
    assert open_dataset(pairs(), classes=["x", "y", "z"]).classes == ("x", "y", "z")
    few = open_dataset(pairs(PIXELS[1:3], [0, 1]), expected=("x", "y", "z"))
    assert (few.classes, few.labels.tolist()) == (("x", "y", "z"), [0, 1])
    named = open_dataset(pairs(PIXELS[:2], ["z", "x"]), expected=("x", "y", "z"))
    assert named.labels.tolist() == [2, 0]
    assert (
        open_dataset(Own(pairs(), classes=NAMES), classes=["x", "y", "z"], expected=("x", "y", "z")).classes[0] == "x"
    )
    own = open_dataset(Digits.embedded(), classes=[f"digit {k}" for k in range(10)])
    assert own.classes[3] == "digit 3"
    assert isinstance(own, Digits)


def test_unread_items_are_left_out_where_labels_are_read(caplog: pytest.LogCaptureFixture) -> None:
    items = pairs()
    items[4] = OSError("gone")
    images = open_dataset(Own(items), max_broken=1)
    assert images.labels.tolist() == [2, 0, 1, 1, 2]
    assert np.array_equal(np.asarray(open_image(images[4][0])), PIXELS[5])
    assert [record.message for record in caplog.records] == ["left out: item 4 of Own cannot be read (OSError: gone)"]


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield PIXELS[0], 0


class Unknown(Own):
    def __len__(self) -> int:
        raise TypeError("endless")


class Long(Own):
    def __init__(self, items: Any, length: int) -> None:
        super().__init__(items)
        self.length = length

    def __len__(self) -> int:
        return self.length


FLOAT = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255


@each(
    ("make", "message"),
    [
        (Endless, "an object of the class Endless has no items by number, which shuffling and resuming need"),
        (lambda: iter(pairs()), "has no items by number"),
        (lambda: 3, "3 has no items by number"),
        (lambda: Own, "has no items by number"),
        (lambda: Unknown(pairs()), "the data set Unknown does not know its length: endless"),
        (lambda: Long(pairs(), 1 << 70), "the data set Long does not know its length: cannot fit 'int'"),
        (lambda: Long(pairs(), -1), "the data set Long does not know its length: __len__() should return >= 0"),
        (lambda: DataLoader(Own(pairs())), "give its data set, loader.dataset"),
        (lambda: {"train": Own(pairs()), "test": Own([])}, "a dict of train, test is no data set"),
        (lambda: datasets.DatasetDict({"train": table()}), "a DatasetDict of train is no data set"),
        (list, "the data set list is empty"),
        (lambda: Subset(Own([]), []), "the data set Own is empty"),
        (lambda: pairs(FLOAT), "item 0 of list has a float32 tensor of shape (3, 8, 10) as its image; remove ToTensor"),
        (
            lambda: Own(pairs(PIXELS / 255)),
            "item 0 of Own has a float64 array of shape (8, 10, 3) as its image; remove",
        ),
        (
            lambda: pairs(PIXELS.astype(np.int64)),
            "has a int64 array of shape (8, 10, 3) as its image; an image is uint8",
        ),
        (lambda: pairs(PIXELS.transpose(0, 3, 1, 2)), "has a uint8 array of shape (3, 8, 10) as its image"),
        (lambda: pairs([b"png"] * 6), "an image is a PIL image, a uint8 array or tensor, or a path"),
        (lambda: (PIXELS, LABELS), "item 0 of tuple is a uint8 array"),
        (lambda: (PIXELS, LABELS), "as list(zip(images, labels)) does"),
        (lambda: Own([(PIXELS[0], 1, 2)]), "item 0 of Own is 3 values"),
        (lambda: Own([{"image": PIXELS[0], "label": 1}]), "a mapping of 'image', 'label'; let the data set return"),
        (lambda: pairs(labels=[0, 1, 2, 3, -1, 0]), "item 4 of list has the label -1; those of 4 classes are 0 to 3"),
        (lambda: Own(pairs(), classes=NAMES[:2]), "item 0 of Own has the label 2; those of 2 classes are 0 to 1"),
        (lambda: pairs(labels=[0, 1, 1 << 40, 3, 1, 0]), "list has label 1,099,511,627,776"),
        (
            lambda: pairs(labels=["ape", "cat", " ", "cat", "ape", ""]),
            "item 2 of list has a blank label, ' '; leave the item",
        ),
        (lambda: pairs(labels=["cat", 1, 2, 0, 1, 2]), "list has numbers and names as labels"),
        (lambda: pairs(labels=[0.5] * 6), "item 0 of list has the label 0.5; a label is a class's number"),
        (lambda: pairs(labels=torch.eye(6)), "has the label a float32 tensor of shape (6,); a label is"),
        (lambda: Own(pairs(labels=["ape"] * 6), classes=NAMES), "item 0 of Own has the label 'ape', which is no class"),
        (lambda: Own(pairs(), classes=["a", "b", "a"]), "classes have 'a' twice"),
        (lambda: Own(pairs(), classes=[1, 2, 3]), "classes must be a list of names"),
        (
            lambda: ConcatDataset([Own(pairs(), classes=NAMES), Own(pairs())]),
            "the parts of a ConcatDataset of Own have",
        ),
        (lambda: table().with_transform(lambda rows: rows), "the table has a transform (set_transform)"),
        (lambda: Own([OSError("gone")] * 3), "item 0 of Own cannot be read (OSError: gone); max_broken=N lets"),
    ],
)
def test_what_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((DataError, ConfigError)) as caught:
        open_dataset(make())
    assert message in str(caught.value)


def test_classes_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="Own has 3 classes where 2 are expected"):
        open_dataset(Own(pairs(), classes=NAMES), expected=("cat", "dog"))
    with pytest.raises(DataError, match="classes name 2 classes, and Digits has 10"):
        open_dataset(Digits.embedded(), classes=["a", "b"])
    with pytest.raises(ConfigError, match="classes must be a list of names, not 'cat'"):
        open_dataset(pairs(), classes="cat")


def broken(images: Images, index: int) -> str:
    with pytest.raises(DataError) as caught:
        open_image(images[index][0])
    return str(caught.value)


def test_items_that_turn_out_bad_are_named(tmp_path: Path) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes(png(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))[:900])
    opened = Image.open(cut)
    items = pairs([Image.fromarray(p) for p in PIXELS])
    for bad, message in (
        (OSError("the disk\nis gone"), "item 1 of Own cannot be read (OSError: the disk is gone)"),
        ((PIXELS[1], 2), "item 1 of Own has the label 2, where the data set's own list of labels, or an earlier look,"),
        ((opened, 0), "cut.png cannot be decoded"),
        ((Image.open(io.BytesIO(cut.read_bytes())), 0), "item 1 of Own cannot be decoded"),
        ((Image.new("F", (4, 4)), 0), "item 1 of Own holds floating-point pixels"),
        ((FLOAT[1], 0), "item 1 of Own has a float32 tensor of shape (3, 8, 10) as its image; remove ToTensor"),
    ):
        images = open_dataset(Own([items[0], bad, *items[2:]], targets=LABELS))
        assert message in broken(images, 1)
    opened.close()


def test_images_without_a_file_keep_their_orientation_and_depth() -> None:
    deep = io.BytesIO()
    Image.fromarray(PIXELS[0, ..., 0].astype(np.uint16) * 257).save(deep, "PNG")
    files = [deep.getvalue()]
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        image, file = Image.fromarray(PIXELS[0]), io.BytesIO()
        image.getexif()[0x0112] = 6  # turned by a quarter
        image.save(file, kind, exif=image.getexif())
        files.append(file.getvalue())
    opened = [Image.open(io.BytesIO(content)) for content in files]
    images = open_dataset(pairs(opened, range(5)))
    for i, content in enumerate(files):
        seen = np.asarray(open_image(images[i][0]))
        assert seen.shape[:2] == ((8, 10) if i == 0 else (10, 8))
        assert np.array_equal(seen, np.asarray(open_image(io.BytesIO(content))))
