"""Batches of images, whose order and crops depend on seed, epoch and image alone.

A run is therefore the same with any number of workers and processes, and any number of them can resume it after any
batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from nfzoo.config import Preprocessing
from nfzoo.data.images import UNLABELLED, Images
from nfzoo.data.workers import PATIENCE, load
from nfzoo.errors import ConfigError, DataError
from nfzoo.transforms.corruptions import Corruption, corrupt
from nfzoo.transforms.decode import open_image
from nfzoo.transforms.mixing import Augment
from nfzoo.transforms.preprocess import evaluation_pixels, evaluation_transform, normalize, training_crop
from nfzoo.transforms.stacks import evaluation_transforms, stackable, training_crops

_MAX_UNREADABLE = 100  # consecutive unreadable images after which the data set counts as broken


class BrokenImageError(DataError):
    """An unreadable image, met in the middle of a pass. One of several processes may raise it alone."""

    of_one_process = True


# -- training


class TrainingBatch(NamedTuple):
    """A micro-batch: one process's share of a global batch, divided by the steps of gradient accumulation.

    Attributes:
        pixels: grey levels 0..255 `(n, C, S, S)`, not normalised: see `preprocess.training_crop`.
        labels: `(n,)` int64, or of multi-label data bool `(n, classes)`.
        indices: samples, int64 `(n,)`: the numbers of the images in the data set, or see `balanced_order`.
        offset: row of the first image in the global batch.
        broken: messages about unreadable images, which other images replace.
    """

    pixels: Tensor
    labels: Tensor
    indices: Tensor
    offset: int
    broken: tuple[str, ...]


def epoch_order(length: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the order of one epoch's samples, `(length,)`."""
    return np.random.default_rng([seed, epoch, 0x0DE2, 1]).permutation(length)  # keys of crops have three words


def balanced_order(labels: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Return the samples of one epoch that has equally many of each class, `(len(labels),)`.

    Of a class with more images than its share, the epoch has some, chosen at random. Of one with fewer, all images come
    again and again, and none once more before all others have. Where the samples do not divide among the classes, some
    have one more, chosen at random. A sample is the number of the image, plus `len(labels)` for each time that it came
    before in this epoch. A sample therefore has random numbers of its own.
    """
    rng = np.random.default_rng([seed, epoch, 0x0DE2, 2])
    length = len(labels)
    by_class = np.argsort(labels, kind="stable")
    members = np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1)
    shares = np.full(len(members), length // len(members))
    shares[rng.permutation(len(members))[: length % len(members)]] += 1
    samples = [
        np.concatenate([rng.permutation(images) + length * k for k in range(-(-share // len(images)))] or [images])[
            :share
        ]
        for images, share in zip(members, shares.tolist(), strict=True)
    ]
    return rng.permutation(np.concatenate(samples))


def share_of_batch(batch_size: int, *, world: int, accumulation: int) -> int:
    """Return the size of a micro-batch: the number of images that one process computes at a time.

    Raises:
        ConfigError: if the batch does not divide among processes and accumulated steps.
    """
    parts = world * accumulation
    if batch_size % parts:
        steps = f" and {accumulation} accumulated steps" if accumulation > 1 else ""
        raise ConfigError(
            f"batch_size {batch_size} does not divide among {world} processes{steps}; make it a multiple of {parts}"
        )
    return batch_size // parts


def training_batches(
    images: Images,
    preprocessing: Preprocessing,
    *,
    epoch: int,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    accumulation: int = 1,
    start: int = 0,
    size: int | None = None,
    augment: Augment | None = None,
    balanced: bool = False,
    workers: int = 0,
    patience: float = PATIENCE,
) -> Iterator[TrainingBatch]:
    """Load one process's micro-batches of one shuffled epoch, cropped and flipped.

    The epoch's order, from sample `start` on, is cut into global batches; an incomplete last one is dropped. Rank r
    gets the r-th part of each, in `accumulation` micro-batches. All parts are consecutive.

    The next readable image of the data set replaces an unreadable one, with its own label. The unreadable one is
    reported only in its own row of the epoch, so all processes together report it once an epoch.

    Args:
        batch_size: images of a global batch, over all processes and accumulated steps.
        start: samples of this epoch that all processes together have processed before.
        balanced: whether the epoch has the order of `balanced_order`, not of `epoch_order`.
        workers: loader processes, see `workers.load`.
        patience: seconds that one of them may take for a batch.

    Raises:
        ConfigError: if the batch does not divide among processes and steps, or `start` is outside the epoch.
        DataError: if the data set does not fill one batch.
        BrokenImageError: if no image can be read, or none of a hundred consecutive ones.
    """
    share = share_of_batch(batch_size, world=world, accumulation=accumulation)
    if len(images) < batch_size:
        raise DataError(f"{len(images)} training images do not fill a batch of {batch_size}; pass a smaller one")
    if not 0 <= start <= len(images):
        raise ConfigError(f"a start at sample {start} lies outside of an epoch of {len(images)}; resume with its data")
    if balanced:
        order = balanced_order(images.labels, seed=seed, epoch=epoch)[start:]
    else:
        order = epoch_order(len(images), seed=seed, epoch=epoch)[start:]
    offsets = [(rank * accumulation + step) * share for step in range(accumulation)]
    firsts = range(0, len(order) - batch_size + 1, batch_size)
    samples = _TrainingSamples(
        images, preprocessing, size or preprocessing.train_size, augment or Augment(), (seed, epoch)
    )
    # A generator, as a long epoch has many indices.
    batches = (order[first + offset : first + offset + share].tolist() for first in firsts for offset in offsets)
    return _training_batches(load(samples, batches, _collate_training, workers, patience=patience), offsets)


def _training_batches(batches: Iterator, offsets: Sequence[int]) -> Iterator[TrainingBatch]:
    for offset, (pixels, labels, indices, broken, fatal) in zip(cycle(offsets), batches, strict=False):
        if fatal is not None:
            raise BrokenImageError(fatal)
        yield TrainingBatch(pixels, labels, indices, offset, broken)


class _TrainingSample(NamedTuple):
    pixels: Tensor | None
    label: Any
    used: int  # the sample, of the image that was read
    broken: str | None


@dataclass
class _TrainingSamples(TorchDataset[_TrainingSample]):
    images: Images
    preprocessing: Preprocessing
    size: int
    augment: Augment
    seeds: tuple[int, int]

    def __getitems__(self, indices: Sequence[int]) -> list[_TrainingSample]:
        images = np.asarray(indices) % len(self.images)  # for one that came before, see `balanced_order`
        levels = self.images.grey_levels(images) if stackable(self.preprocessing) else None
        if levels is None:
            return [self[i] for i in indices]
        rngs = [np.random.default_rng([*self.seeds, i]) for i in indices]
        crop = {"scale": self.augment.scale, "ratio": self.augment.ratio, "flip": self.augment.flip}
        pixels = training_crops(levels, self.preprocessing, rngs, size=self.size, **crop)
        return list(map(_TrainingSample, pixels, self.images.labels[images], indices, repeat(None)))

    def __getitem__(self, index: int) -> _TrainingSample:  # type: ignore[override]
        broken: str | None = None
        tries = min(_MAX_UNREADABLE, len(self.images))
        before = index - index % len(self.images)  # for an image that came before, see `balanced_order`
        for candidate in (np.arange(index, index + tries) % len(self.images)).tolist():
            try:
                source, label = self.images[candidate]
                min_side = 2 * self.size if self.augment.draft else None
                image = open_image(source, channels=len(self.preprocessing.mean), min_side=min_side)
            except DataError as error:
                broken = broken or str(error)
                continue
            # Keyed by the row's own index: a replacement gets another crop here than in its own row.
            rng = np.random.default_rng([*self.seeds, index])
            pixels = training_crop(
                image,
                self.preprocessing,
                rng,
                scale=self.augment.scale,
                ratio=self.augment.ratio,
                flip=self.augment.flip,
                size=self.size,
            )
            return _TrainingSample(pixels, label, before + candidate, broken)
        row = "none of the images can be read" if tries < _MAX_UNREADABLE else f"{tries} images in a row cannot be read"
        return _TrainingSample(None, self.images.labels[0], index, f"{row}, such as: {broken}")


def _collate_training(
    samples: list[_TrainingSample],
) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...], str | None]:
    fatal = next((sample.broken for sample in samples if sample.pixels is None), None)
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    return (
        torch.stack(pixels) if fatal is None else torch.empty(0),
        _stacked([sample.label for sample in samples]),
        torch.tensor([sample.used for sample in samples], dtype=torch.int64),
        tuple(sample.broken for sample in samples if sample.broken is not None),
        fatal,
    )


def _stacked(labels: list[Any]) -> Tensor:
    """Return the labels of a batch: int64 `(n,)`, or of sets bool `(n, classes)`."""
    return torch.from_numpy(np.array(labels))


# -- evaluation and prediction


class EvaluationBatch(NamedTuple):
    """A batch of model inputs.

    Attributes:
        pixels: `(n, C, S, S)`; rows of unreadable images are zero.
        labels: `(n,)` int64, or of multi-label data bool `(n, classes)`.
        broken: row of each unreadable image -> message.
    """

    pixels: Tensor
    labels: Tensor
    broken: dict[int, str]


def load_batches(
    images: Images,
    preprocessing: Preprocessing,
    size: int,
    batches: Sequence[Sequence[int]],
    workers: int,
    *,
    corruption: Corruption | None = None,
    patience: float = PATIENCE,
) -> Iterator[EvaluationBatch]:
    """Load batches of the given indices as model inputs with sides of `size` pixels, corrupted if asked."""
    samples = _EvaluationSamples(images, preprocessing, size, corruption)
    return load(samples, batches, samples.collate, workers if batches else 0, patience=patience)


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
    indices: list[int] | None = None,
    corruption: Corruption | None = None,
    patience: float = PATIENCE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Load one process's share of all images. Processes share no image; the last batch may be smaller.

    Args:
        broken: list to which a message about each unreadable image is appended; the image is left out.
        indices: list to which the index of each image is appended, in the order of the batches' rows.
        corruption: of the inputs, after they are resized and cropped.

    Raises:
        BrokenImageError: for an unreadable image, if `broken` is `None`.
    """
    share = range(rank, len(images), world)
    batches = [share[first : first + batch_size] for first in range(0, len(share), batch_size)]
    side = size or preprocessing.test_size
    loaded = load_batches(images, preprocessing, side, batches, workers, corruption=corruption, patience=patience)
    for rows, (pixels, labels, problems) in zip(batches, loaded, strict=True):
        if problems:
            if broken is None:
                raise BrokenImageError(next(iter(problems.values())))
            broken += problems.values()
            readable = [i for i in range(len(labels)) if i not in problems]
            pixels, labels, rows = pixels[readable], labels[readable], [rows[i] for i in readable]
        if indices is not None:
            indices += rows
        if len(labels):
            yield pixels, labels


@dataclass
class _EvaluationSamples(TorchDataset["tuple[Tensor, Any] | str"]):
    """Model inputs with labels, or messages about unreadable images."""

    images: Images
    preprocessing: Preprocessing
    size: int
    corruption: Corruption | None = None

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Any] | str]:
        stacks = self.corruption is None and stackable(self.preprocessing)
        levels = self.images.grey_levels(indices) if stacks else None
        if levels is None:
            return [self[i] for i in indices]
        pixels = evaluation_transforms(levels, self.preprocessing, size=self.size)
        return list(zip(pixels, self.images.labels[np.asarray(indices)], strict=True))

    def __getitem__(self, index: int) -> tuple[Tensor, Any] | str:  # type: ignore[override]
        try:
            source, label = self.images[index]
            image = open_image(source, channels=len(self.preprocessing.mean))
            if self.corruption is None:
                return evaluation_transform(image, self.preprocessing, size=self.size), label
            pixels = evaluation_pixels(image, self.preprocessing, size=self.size)
            levels = np.clip(np.round(pixels), 0, 255).astype(np.uint8)
            return normalize(corrupt(levels, self.corruption, index), self.preprocessing), label
        except DataError as error:
            return str(error)

    def collate(self, samples: list[tuple[Tensor, Any] | str]) -> EvaluationBatch:
        none = np.zeros(self.images.labels.shape[1], bool) if self.images.multi_label else UNLABELLED
        unreadable = torch.zeros(len(self.preprocessing.mean), self.size, self.size), none
        rows = [unreadable if isinstance(sample, str) else sample for sample in samples]
        return EvaluationBatch(
            torch.stack([pixels for pixels, _ in rows]),
            _stacked([label for _, label in rows]),
            {i: sample for i, sample in enumerate(samples) if isinstance(sample, str)},
        )
