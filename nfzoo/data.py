"""Data sets of images with labels, and loaders whose order depends on the seed and the epoch alone.

A data set is map-style: `data[i]` is `(image or its path, label)`. The order of an epoch and the crops of an image are
functions of (seed, epoch, index), so a run is the same with any number of workers and processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from .config import Preprocessing
from .errors import ConfigError, DataError
from .preprocess import IMAGE_SUFFIXES, evaluation_transform, open_image, training_transform

DIGITS = "digits"
HELD_OUT = 0.2
"""Part of each class that is held out by default."""

_DIGITS_SIZE = 32
_VALIDATION_NAMES = ("val", "validation", "test")


class Images(Protocol):
    """Labelled images, read at random."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Path | Image.Image, int]: ...


@dataclass(frozen=True)
class Digits:
    """The embedded 1,797 handwritten digits, as 32x32 greyscale images with white strokes on black."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...] = tuple("0123456789")

    @classmethod
    def embedded(cls) -> Digits:
        with files("nfzoo").joinpath("assets/digits.npz").open("rb") as file, np.load(file) as arrays:
            return cls(arrays["images"], arrays["labels"])

    def subset(self, indices: Sequence[int] | np.ndarray) -> Digits:
        return Digits(self.images[indices], self.labels[indices])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        grey = np.round(self.images[index] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(grey).resize((_DIGITS_SIZE, _DIGITS_SIZE), Image.Resampling.BICUBIC)
        return image, int(self.labels[index])


@dataclass(frozen=True)
class ImageFolder:
    """Images in one folder per class."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    @classmethod
    def scan(cls, folder: str | Path, classes: tuple[str, ...] | None = None) -> ImageFolder:
        """All images below `folder/CLASS/`, sorted; hidden entries and files that are not images are passed over.

        Args:
            classes: the class names to expect, where they are known already.

        Raises:
            DataError: for a missing folder, no classes, a class without images, or other classes than expected.
        """
        folder = Path(folder)
        if not folder.is_dir():
            kind = "is not a folder" if folder.exists() else "does not exist"
            raise DataError(f"the data folder {str(folder)!r} {kind}; give one with a subfolder of images per class")
        found = tuple(sorted(e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith(".")))
        if not found:
            raise DataError(f"{str(folder)!r} has no subfolders; put the images of each class into a folder of its own")
        for name in found:
            if any("\ud800" <= c <= "\udfff" for c in name):  # bytes that are no UTF-8, which no file of ours can hold
                raise DataError(f"the class folder {str(folder / name)!r} has a name that is no text; rename it")
        if classes is not None and found != classes:
            odd = sorted(set(found) ^ set(classes))
            raise DataError(
                f"{str(folder)!r} has {len(found)} classes where {len(classes)} are expected; they differ in "
                f"{', '.join(map(repr, odd[:5]))}"
            )
        paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(found):
            images = sorted(_image_files(folder / name))
            if not images:
                raise DataError(f"the class folder {str(folder / name)!r} holds no images; remove it or fill it")
            paths += images
            labels += [label] * len(images)
        return cls(tuple(paths), tuple(labels), found)

    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageFolder:
        return ImageFolder(tuple(self.paths[i] for i in indices), tuple(self.labels[i] for i in indices), self.classes)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Path, int]:
        return self.paths[index], self.labels[index]

    def without_broken(self) -> tuple[ImageFolder, list[str]]:
        """This folder without the images that cannot be decoded, and what was wrong with each. Reads every image."""
        keep, problems = [], []
        for i in range(len(self)):
            try:
                open_image(self.paths[i])
                keep.append(i)
            except DataError as error:
                problems.append(str(error))
        return self.subset(keep), problems


def _image_files(folder: Path) -> Iterator[Path]:
    """All images below a folder. Links to folders are followed, but no folder is entered twice."""
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield Path(root) / name


class Split(NamedTuple):
    """Training and held-out images with the same classes."""

    train: Digits | ImageFolder
    validation: Digits | ImageFolder


def open_split(source: str, *, validation_fraction: float = HELD_OUT, seed: int = 0) -> Split:
    """The two parts of a data set.

    Args:
        source: `"digits"`, or a folder. A folder with `train/` and `val/` (or `validation/`, `test/`) inside is split
            already; of any other, `validation_fraction` of each class is held out, the same part for the same `seed`.

    Raises:
        DataError: see `ImageFolder.scan`; also if a class is too small to be split.
    """
    if not 0 < validation_fraction < 1:
        raise ConfigError(f"validation_fraction must be between 0 and 1, not {validation_fraction!r}")
    if source == DIGITS:
        whole: Digits | ImageFolder = Digits.embedded()
    else:
        root = Path(source)
        held_out = held_out_folder(root)
        if held_out is not None:
            train = ImageFolder.scan(root / "train")
            return Split(train, ImageFolder.scan(held_out, train.classes))
        whole = ImageFolder.scan(root)
    held = _stratified(np.asarray(whole.labels), whole.classes, validation_fraction, seed)
    return Split(whole.subset(np.flatnonzero(~held)), whole.subset(np.flatnonzero(held)))


def held_out_folder(root: Path) -> Path | None:
    """The part beside `root/train/` that is not trained on; `None` if there is no `train/`.

    Raises:
        DataError: if there is `train/` and no such part.
    """
    if not (root / "train").is_dir():
        return None
    found = [root / name for name in _VALIDATION_NAMES if (root / name).is_dir()]
    if not found:
        raise DataError(f"{str(root)!r} has train/ but none of {', '.join(n + '/' for n in _VALIDATION_NAMES)}")
    return found[0]


def _stratified(labels: np.ndarray, classes: tuple[str, ...], fraction: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 0x5EED])
    held = np.zeros(len(labels), dtype=bool)
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(
                f"class {name!r} has {len(members)} image, too few to hold any out; add images, or split the folder "
                "into train/ and val/ yourself"
            )
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        held[rng.permutation(members)[:count]] = True
    return held


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random crops and flips of training images.

    Attributes:
        scale: smallest and largest part of the image's area that a crop covers.
        ratio: smallest and largest ratio of a crop's width to its height.
        flip: probability of a horizontal flip.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        for name, high in (("scale", 1.0), ("ratio", float("inf"))):
            value = getattr(self, name)
            if len(value) != 2 or not 0 < value[0] <= value[1] <= high:
                raise ConfigError(f"{name} must be two rising positive numbers, not {value!r}")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip must be a probability, not {self.flip!r}")


GENTLE = Augment(scale=(0.7, 1.0), ratio=(0.85, 1.18), flip=0.0)
"""For pictures that a flip or a tight crop would turn into something else, such as digits."""


class Broken(NamedTuple):
    """Stands for an image that could not be read, on its way from a worker to the loop that reports it."""

    message: str


class BrokenImageError(DataError):
    """An image that cannot be read, found in the middle of a pass; of several processes perhaps by one alone."""


class _Samples(TorchDataset[tuple[Tensor, int] | Broken]):
    """Model inputs under keys `(epoch, index)`; `epoch` seeds the augmentation."""

    def __init__(
        self, images: Images, preprocessing: Preprocessing, size: int, augment: Augment | None, seed: int
    ) -> None:
        self.images, self.preprocessing, self.size, self.augment, self.seed = images, preprocessing, size, augment, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | Broken:  # type: ignore[override]
        epoch, index = key
        try:
            source, label = self.images[index]
            image = open_image(source, channels=len(self.preprocessing.mean))
            if self.augment is None:
                return evaluation_transform(image, self.preprocessing, size=self.size), label
            rng = np.random.default_rng([self.seed, epoch, index])
            pixels = training_transform(
                image,
                self.preprocessing,
                rng,
                scale=self.augment.scale,
                ratio=self.augment.ratio,
                flip=self.augment.flip,
                size=self.size,
            )
            return pixels, label
        except DataError as error:
            return Broken(str(error))


def _collate(samples: list[tuple[Tensor, int] | Broken]) -> tuple[Tensor, Tensor, list[str]]:
    good = [sample for sample in samples if not isinstance(sample, Broken)]
    images = torch.stack([x for x, _ in good]) if good else torch.empty(0)
    labels = torch.tensor([y for _, y in good], dtype=torch.int64)
    return images, labels, [sample.message for sample in samples if isinstance(sample, Broken)]


def epoch_order(length: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch's samples, `(length,)`."""
    return np.random.default_rng([seed, epoch, 0x0DE2]).permutation(length)


def training_batches(
    images: Images,
    preprocessing: Preprocessing,
    *,
    epoch: int,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    size: int | None = None,
    augment: Augment | None = None,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One process's part of every batch of one shuffled epoch: images `(batch / world, C, size, size)` and labels.

    A last batch that would not be full is left out. Rank r takes the r-th consecutive part of each global batch.

    Raises:
        BrokenImageError: for an image that cannot be read, by name.
        DataError: if the data do not fill one batch.
    """
    if batch_size % world:
        raise ConfigError(f"a batch of {batch_size} cannot be shared by {world} processes; make it a multiple")
    if len(images) < batch_size:
        raise DataError(f"{len(images)} training images do not fill a batch of {batch_size}; take a smaller batch")
    order = epoch_order(len(images), seed=seed, epoch=epoch)
    part = batch_size // world
    starts = range(0, len(images) - batch_size + 1, batch_size)
    keys = [[(epoch, int(i)) for i in order[s + rank * part : s + (rank + 1) * part]] for s in starts]
    samples = _Samples(images, preprocessing, size or preprocessing.train_size, augment or Augment(), seed)
    yield from _load(samples, keys, workers)


def evaluation_batches(
    images: Images,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    size: int | None = None,
    workers: int = 0,
    broken: list[str] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One process's share of all images, each exactly once over all processes; the last batch may be smaller.

    Args:
        broken: takes what is wrong with each image that cannot be read, which is then left out.

    Raises:
        BrokenImageError: for an image that cannot be read, by name, if there is no `broken`.
    """
    own = range(rank, len(images), world)
    keys = [[(0, i) for i in own[s : s + batch_size]] for s in range(0, len(own), batch_size)]
    samples = _Samples(images, preprocessing, size or preprocessing.test_size, None, 0)
    yield from _load(samples, keys, workers, broken)


def _load(
    samples: _Samples, keys: list[list[tuple[int, int]]], workers: int, broken: list[str] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    loader = DataLoader(
        samples,
        batch_sampler=keys,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
    )
    for images, labels, problems in loader:
        if problems and broken is None:
            raise BrokenImageError(problems[0])
        if broken is not None:
            broken += problems
        if len(labels):
            yield images, labels


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
