"""Batches of images, whose order and crops depend on the seed, the epoch and the image alone.

So a run is the same with any number of workers and processes, and can be taken up again after any batch by any number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from nfzoo.config import Preprocessing
from nfzoo.data.images import DIGITS, Digits, ImageFolder, Images
from nfzoo.data.source import HELD_OUT, HeldOut, Split, has_held_out, held_out_folder, open_held_out, open_split
from nfzoo.errors import ConfigError, DataError
from nfzoo.transforms.decode import open_image
from nfzoo.transforms.mixing import GENTLE, Augment
from nfzoo.transforms.preprocess import evaluation_transform, training_crop

__all__ = [
    "DIGITS",
    "GENTLE",
    "HELD_OUT",
    "Augment",
    "BrokenImageError",
    "Digits",
    "HeldOut",
    "ImageFolder",
    "Images",
    "Split",
    "TrainingBatch",
    "epoch_order",
    "evaluation_batches",
    "has_held_out",
    "held_out_folder",
    "open_held_out",
    "open_split",
    "training_batches",
]

_IN_A_ROW = 100  # unreadable images after which the data set, not an image, is what is broken


class TrainingBatch(NamedTuple):
    """One process's part of a global batch, or of one of the steps over which its gradient is accumulated.

    Attributes:
        pixels: grey levels 0..255 `(n, C, S, S)`, not normalised: see `preprocess.training_crop`.
        labels: `(n,)` int64.
        indices: which images of the data set these are, `(n,)` int64.
        offset: row of the first of them in the global batch.
        broken: what was wrong with the images that could not be read, in whose place the next readable ones stand.
    """

    pixels: Tensor
    labels: Tensor
    indices: Tensor
    offset: int
    broken: tuple[str, ...]


class BrokenImageError(DataError):
    """An image that cannot be read, found in the middle of a pass; of several processes perhaps by one alone."""


def epoch_order(length: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch's samples, `(length,)`."""
    return np.random.default_rng([seed, epoch, 0x0DE2, 1]).permutation(length)  # crops have three words


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
    workers: int = 0,
) -> Iterator[TrainingBatch]:
    """One process's part of every batch of one shuffled epoch, cropped and flipped.

    The epoch's order, from sample `start` on, is cut into global batches; a last one that would not be full is left
    out. Of each, rank r takes the r-th consecutive part, and gives it as `accumulation` consecutive smaller ones.

    An image that cannot be read is replaced by the next one of the data set that can, with its label; it is told of
    once, where its own turn is, so that all processes together tell of each once an epoch.

    Args:
        batch_size: images of a global batch, over all processes and accumulated steps.
        start: samples of this epoch that all processes together have had already.

    Raises:
        ConfigError: for a batch that does not divide among processes and steps, or a `start` outside of the epoch.
        DataError: if a whole epoch does not fill one batch.
        BrokenImageError: if no image can be read, or none of a hundred in a row.
    """
    parts = world * accumulation
    if batch_size % parts:
        steps = f" and {accumulation} accumulated steps" if accumulation > 1 else ""
        raise ConfigError(
            f"a batch of {batch_size} cannot be shared by {world} processes{steps}; make it a multiple of {parts}"
        )
    if len(images) < batch_size:
        raise DataError(f"{len(images)} training images do not fill a batch of {batch_size}; take a smaller batch")
    if not 0 <= start <= len(images):
        raise ConfigError(f"a start at sample {start} lies outside of an epoch of {len(images)}; resume with its data")
    order = epoch_order(len(images), seed=seed, epoch=epoch)[start:]
    part = batch_size // parts
    offsets = [(rank * accumulation + step) * part for step in range(accumulation)]
    firsts = range(0, len(order) - batch_size + 1, batch_size)
    keys = _Keys(order, [(first, offset) for first in firsts for offset in offsets], part)
    samples = _TrainingSamples(
        images, preprocessing, size or preprocessing.train_size, augment or Augment(), (seed, epoch)
    )
    return _training_batches(samples, keys, workers)


def _training_batches(samples: _TrainingSamples, keys: _Keys, workers: int) -> Iterator[TrainingBatch]:
    for (_, offset), (pixels, labels, indices, broken, fatal) in zip(
        keys.places, _load(samples, keys, workers), strict=True
    ):
        if fatal is not None:
            raise BrokenImageError(fatal)
        yield TrainingBatch(pixels, labels, indices, offset, broken)


class _Keys:
    """The indices of each batch: made when they are wanted, an epoch of them being long."""

    def __init__(self, order: np.ndarray, places: list[tuple[int, int]], count: int) -> None:
        self.order, self.places, self.count = order, places, count

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[list[int]]:
        for first, offset in self.places:
            yield self.order[first + offset : first + offset + self.count].tolist()


class _TrainingSample(NamedTuple):
    pixels: Tensor | None
    label: int
    used: int
    broken: str | None


class _TrainingSamples(TorchDataset[_TrainingSample]):
    def __init__(
        self, images: Images, preprocessing: Preprocessing, size: int, augment: Augment, seeds: tuple[int, int]
    ) -> None:
        self.images, self.preprocessing, self.size, self.augment, self.seeds = (
            images,
            preprocessing,
            size,
            augment,
            seeds,
        )

    def __getitem__(self, index: int) -> _TrainingSample:  # type: ignore[override]
        broken: str | None = None
        tries = min(_IN_A_ROW, len(self.images))
        for other in (np.arange(index, index + tries) % len(self.images)).tolist():
            try:
                source, label = self.images[other]
                least = 2 * self.size if self.augment.draft else None
                image = open_image(source, channels=len(self.preprocessing.mean), least=least)
            except DataError as error:
                broken = broken or str(error)
                continue
            # The randomness is that of the turn: a stand-in is cropped otherwise than where it stands for itself.
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
            return _TrainingSample(pixels, label, other, broken)
        row = "none of the images can be read" if tries < _IN_A_ROW else f"{tries} images in a row cannot be read"
        return _TrainingSample(None, 0, index, f"{row}, such as: {broken}")


def _collate_training(
    samples: list[_TrainingSample],
) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...], str | None]:
    fatal = next((sample.broken for sample in samples if sample.pixels is None), None)
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    return (
        torch.stack(pixels) if fatal is None else torch.empty(0),
        torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        torch.tensor([sample.used for sample in samples], dtype=torch.int64),
        tuple(sample.broken for sample in samples if sample.broken is not None),
        fatal,
    )


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
    own = np.arange(rank, len(images), world)
    keys = _Keys(own, [(first, 0) for first in range(0, len(own), batch_size)], batch_size)
    samples = _EvaluationSamples(images, preprocessing, size or preprocessing.test_size)
    for pixels, labels, problems in _load(samples, keys, workers):
        if problems and broken is None:
            raise BrokenImageError(problems[0])
        if broken is not None:
            broken += problems
        if len(labels):
            yield pixels, labels


class _EvaluationSamples(TorchDataset["tuple[Tensor, int] | str"]):
    """Model inputs, or what is wrong with the image."""

    def __init__(self, images: Images, preprocessing: Preprocessing, size: int) -> None:
        self.images, self.preprocessing, self.size = images, preprocessing, size

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:  # type: ignore[override]
        try:
            source, label = self.images[index]
            image = open_image(source, channels=len(self.preprocessing.mean))
            return evaluation_transform(image, self.preprocessing, size=self.size), label
        except DataError as error:
            return str(error)


def _collate_evaluation(samples: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor, list[str]]:
    good = [sample for sample in samples if not isinstance(sample, str)]
    pixels = torch.stack([x for x, _ in good]) if good else torch.empty(0)
    labels = torch.tensor([y for _, y in good], dtype=torch.int64)
    return pixels, labels, [sample for sample in samples if isinstance(sample, str)]


def _load(samples: _TrainingSamples | _EvaluationSamples, keys: _Keys, workers: int) -> Iterator:
    return iter(
        DataLoader(
            samples,
            batch_sampler=keys,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_collate_training if isinstance(samples, _TrainingSamples) else _collate_evaluation,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_one_thread,
        )
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
