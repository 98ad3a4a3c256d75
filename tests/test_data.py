"""Data sets, splits, and loaders that give the same run with any number of workers and processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nfzoo.config import Preprocessing
from nfzoo.data import (
    GENTLE,
    Augment,
    Digits,
    ImageFolder,
    epoch_order,
    evaluation_batches,
    open_split,
    training_batches,
)
from nfzoo.errors import ConfigError, DataError

PREPROCESSING = Preprocessing(train_size=16, test_size=16, margin=0)


def write_images(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "pets", {"cat": 10, "dog": 6})


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    digits = Digits.embedded()
    pixels, labels = load_digits(return_X_y=True)
    assert np.array_equal(digits.images.reshape(1797, 64), pixels)
    assert np.array_equal(digits.labels, labels)
    image, label = digits[3]
    assert (image.size, image.mode, label) == ((32, 32), "L", 3)
    assert np.asarray(image).max() > 200


@pytest.mark.parametrize("seed", [0, 1])
def test_split_holds_out_a_part_of_each_class(seed: int) -> None:
    train, validation = open_split("digits", validation_fraction=0.25, seed=seed)
    assert len(train) + len(validation) == 1797
    for digit in range(10):
        held = np.sum(np.asarray(validation.labels) == digit)
        assert held == round(0.25 * np.sum(Digits.embedded().labels == digit))
    again = open_split("digits", validation_fraction=0.25, seed=seed)
    assert np.array_equal(np.asarray(validation.labels), np.asarray(again.validation.labels))
    other = open_split("digits", validation_fraction=0.25, seed=seed + 7)
    assert isinstance(validation, Digits)
    assert isinstance(other.validation, Digits)
    assert not np.array_equal(validation.images, other.validation.images)


def test_folder_is_split_without_overlap(folder: Path) -> None:
    train, validation = open_split(str(folder), validation_fraction=0.3)
    assert isinstance(train, ImageFolder)
    assert isinstance(validation, ImageFolder)
    assert train.classes == validation.classes == ("cat", "dog")
    assert not set(train.paths) & set(validation.paths)
    assert {*train.paths, *validation.paths} == set(folder.rglob("*.png"))
    assert sorted(validation.labels) == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_folder_with_its_own_split(tmp_path: Path, name: str) -> None:
    write_images(tmp_path / "train", {"a": 3, "b": 1})
    write_images(tmp_path / name, {"a": 1, "b": 2})
    train, validation = open_split(str(tmp_path))
    assert (len(train), len(validation)) == (4, 3)


def test_hidden_and_other_files_are_passed_over(folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / "cat" / ".hidden.png").write_bytes(b"")
    (folder / "cat" / "deeper").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "cat" / "deeper" / "more.JPG", "jpeg")
    assert len(ImageFolder.scan(folder)) == 17


def test_no_folder_is_entered_twice(folder: Path) -> None:
    (folder / "cat" / "loop").symlink_to(folder / "cat", target_is_directory=True)
    (folder / "cat" / "other").symlink_to(folder / "cat" / "loop", target_is_directory=True)
    assert len(ImageFolder.scan(folder)) == 16


def damage(folder: Path, case: str) -> str:
    """Make `folder` unusable; returns the path to open."""
    match case:
        case "missing":
            return str(folder / "nowhere")
        case "file":
            return str(folder / "cat" / "0.png")
        case "no classes":
            (folder / "empty").mkdir()
            return str(folder / "empty")
        case "empty class":
            (folder / "bird").mkdir()
            return str(folder)
        case "no text":
            write_images(folder, {"\udcff\udcfe": 3})
            return str(folder)
        case "one image":
            write_images(folder, {"fish": 1})
            return str(folder)
        case "no validation":
            (folder / "cat").rename(folder / "train")
            return str(folder)
    raise AssertionError(case)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "does not exist"),
        ("file", "is not a folder"),
        ("no classes", "no subfolders"),
        ("empty class", "bird"),
        ("no text", "no text"),
        ("one image", "too few to hold any out"),
        ("no validation", "none of val/"),
    ],
)
def test_unusable_folders_are_named(folder: Path, case: str, message: str) -> None:
    source = damage(folder, case)
    with pytest.raises(DataError, match=message):
        open_split(source)


def test_validation_with_other_classes_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 2, "b": 2})
    write_images(tmp_path / "val", {"a": 1, "c": 1})
    with pytest.raises(DataError, match="'b', 'c'"):
        open_split(str(tmp_path))


def load(data: ImageFolder, **options: int) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(training_batches(data, PREPROCESSING, batch_size=4, augment=Augment(), **options))  # type: ignore[arg-type]
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_workers_do_not_change_an_epoch(folder: Path) -> None:
    data = ImageFolder.scan(folder)
    alone, labels = load(data, epoch=3, seed=1)
    helped, same = load(data, epoch=3, seed=1, workers=2)
    assert torch.equal(alone, helped)
    assert torch.equal(labels, same)


def test_epochs_and_seeds_differ(folder: Path) -> None:
    data = ImageFolder.scan(folder)
    first = load(data, epoch=0, seed=0)[0]
    assert torch.equal(first, load(data, epoch=0, seed=0)[0])
    assert not torch.equal(first, load(data, epoch=1, seed=0)[0])
    assert not torch.equal(first, load(data, epoch=0, seed=1)[0])


def test_ranks_share_each_global_batch(folder: Path) -> None:
    data = ImageFolder.scan(folder)
    whole = list(training_batches(data, PREPROCESSING, epoch=0, seed=0, batch_size=4))
    parts = [
        list(training_batches(data, PREPROCESSING, epoch=0, seed=0, batch_size=4, rank=rank, world=2))
        for rank in (0, 1)
    ]
    assert len(whole) == 4
    for (x, y), (x0, y0), (x1, y1) in zip(whole, *parts, strict=True):
        assert torch.equal(x, torch.cat([x0, x1]))
        assert torch.equal(y, torch.cat([y0, y1]))


def test_order_is_a_permutation() -> None:
    assert sorted(epoch_order(100, seed=0, epoch=0)) == list(range(100))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_image_once(folder: Path, world: int) -> None:
    data = ImageFolder.scan(folder)
    seen = [
        y
        for rank in range(world)
        for _, y in evaluation_batches(data, PREPROCESSING, batch_size=3, rank=rank, world=world)
    ]
    assert sorted(torch.cat(seen).tolist()) == list(data.labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named(folder: Path, workers: int) -> None:
    broken = folder / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError, match=r"3\.png"):
        load(ImageFolder.scan(folder), epoch=0, seed=0, workers=workers)
    kept, problems = ImageFolder.scan(folder).without_broken()
    assert len(kept) == 15
    assert broken not in kept.paths
    assert len(problems) == 1
    assert str(broken) in problems[0]
    load(kept, epoch=0, seed=0)


def test_unfillable_batches_are_refused(folder: Path) -> None:
    data = ImageFolder.scan(folder)
    with pytest.raises(DataError, match="do not fill a batch of 17"):
        next(training_batches(data, PREPROCESSING, epoch=0, seed=0, batch_size=17))
    with pytest.raises(ConfigError, match="cannot be shared by 3"):
        next(training_batches(data, PREPROCESSING, epoch=0, seed=0, batch_size=4, world=3))


@pytest.mark.parametrize("change", [{"scale": (0.5, 2.0)}, {"scale": (0.9, 0.1)}, {"ratio": (0, 1)}, {"flip": 2}])
def test_augmentation_is_checked(change: dict) -> None:
    with pytest.raises(ConfigError):
        Augment(**change)
    assert GENTLE.flip == 0
