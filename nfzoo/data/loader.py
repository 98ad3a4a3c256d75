"""Batches of images, whose order and crops depend on the seed, the epoch and the image alone.

So a run is the same with any number of workers and processes, and can be resumed after any batch by any number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from nfzoo.config import Preprocessing
from nfzoo.data.images import UNLABELLED, Images
from nfzoo.errors import ConfigError, DataError
from nfzoo.transforms.decode import open_image
from nfzoo.transforms.mixing import Augment
from nfzoo.transforms.preprocess import evaluation_transform, training_crop

_IN_A_ROW = 100  # unreadable images after which the data set, not an image, is what is broken


class BrokenImageError(DataError):
    """An image that cannot be read, found in the middle of a pass; of several processes perhaps by one alone."""


# -- training


class TrainingBatch(NamedTuple):
    """One process's part of a global batch, or of one of the steps over which its gradient is accumulated.

    Attributes:
        pixels: grey levels 0..255 `(n, C, S, S)`, not normalised: see `preprocess.training_crop`.
        labels: `(n,)` int64.
        indices: which images of the data set these are, `(n,)` int64.
        offset: row of the first of them in the global batch.
        broken: what was wrong with the images that could not be read; others stand in for them.
    """

    pixels: Tensor
    labels: Tensor
    indices: Tensor
    offset: int
    broken: tuple[str, ...]


def epoch_order(length: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the order of one epoch's samples, `(length,)`."""
    return np.random.default_rng([seed, epoch, 0x0DE2, 1]).permutation(length)  # crops have three words


def share_of_batch(batch_size: int, *, world: int, accumulation: int) -> int:
    """Return the images of a global batch that one process computes at a time.

    Raises:
        ConfigError: for a batch that does not divide among processes and accumulated steps.
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
    workers: int = 0,
) -> Iterator[TrainingBatch]:
    """Load one process's part of every batch of one shuffled epoch, cropped and flipped.

    The epoch's order, from sample `start` on, is cut into global batches; a last one that would not be full is left
    out. Of each, rank r gets the r-th consecutive part, as `accumulation` consecutive smaller ones.

    An image that cannot be read is replaced by the next one of the data set that can, with its label. It is reported
    once, at its own turn, so that all processes together report each once an epoch.

    Args:
        batch_size: images of a global batch, over all processes and accumulated steps.
        start: samples of this epoch that all processes together have had already.

    Raises:
        ConfigError: for a batch that does not divide among processes and steps, or a `start` outside of the epoch.
        DataError: if a whole epoch does not fill one batch.
        BrokenImageError: if no image can be read, or none of a hundred in a row.
    """
    share = share_of_batch(batch_size, world=world, accumulation=accumulation)
    if len(images) < batch_size:
        raise DataError(f"{len(images)} training images do not fill a batch of {batch_size}; pass a smaller one")
    if not 0 <= start <= len(images):
        raise ConfigError(f"a start at sample {start} lies outside of an epoch of {len(images)}; resume with its data")
    order = epoch_order(len(images), seed=seed, epoch=epoch)[start:]
    offsets = [(rank * accumulation + step) * share for step in range(accumulation)]
    firsts = range(0, len(order) - batch_size + 1, batch_size)
    samples = _TrainingSamples(
        images, preprocessing, size or preprocessing.train_size, augment or Augment(), (seed, epoch)
    )
    # Made on demand: the indices of a long epoch are many.
    batches = (order[first + offset : first + offset + share].tolist() for first in firsts for offset in offsets)
    return _training_batches(_load(samples, batches, _collate_training, workers), offsets)


def _training_batches(batches: Iterator, offsets: Sequence[int]) -> Iterator[TrainingBatch]:
    for offset, (pixels, labels, indices, broken, fatal) in zip(cycle(offsets), batches, strict=False):
        if fatal is not None:
            raise BrokenImageError(fatal)
        yield TrainingBatch(pixels, labels, indices, offset, broken)


class _TrainingSample(NamedTuple):
    pixels: Tensor | None
    label: int
    used: int  # index of the image
    broken: str | None


@dataclass
class _TrainingSamples(TorchDataset[_TrainingSample]):
    images: Images
    preprocessing: Preprocessing
    size: int
    augment: Augment
    seeds: tuple[int, int]

    def __getitem__(self, index: int) -> _TrainingSample:  # type: ignore[override]
        broken: str | None = None
        tries = min(_IN_A_ROW, len(self.images))
        for candidate in (np.arange(index, index + tries) % len(self.images)).tolist():
            try:
                source, label = self.images[candidate]
                min_side = 2 * self.size if self.augment.draft else None
                image = open_image(source, channels=len(self.preprocessing.mean), min_side=min_side)
            except DataError as error:
                broken = broken or str(error)
                continue
            # The generator is that of the turn: as a stand-in, an image is cropped otherwise than at its own turn.
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
            return _TrainingSample(pixels, label, candidate, broken)
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


# -- evaluation and prediction


class EvaluationBatch(NamedTuple):
    """Images as the model's inputs.

    Attributes:
        pixels: `(n, C, S, S)`; zeros for images that cannot be read, so that the others keep their rows.
        labels: `(n,)` int64.
        broken: what is wrong with each image that cannot be read, by its row.
    """

    pixels: Tensor
    labels: Tensor
    broken: dict[int, str]


def load_batches(
    images: Images, preprocessing: Preprocessing, size: int, batches: Sequence[Sequence[int]], workers: int
) -> Iterator[EvaluationBatch]:
    """Load these batches of images, with sides of `size` pixels."""
    samples = _EvaluationSamples(images, preprocessing, size)
    return _load(samples, batches, samples.collate, workers if batches else 0)


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
    """Load one process's share of all images, each exactly once over all processes; the last batch may be smaller.

    Args:
        broken: is appended what is wrong with each image that cannot be read, which is then left out.

    Raises:
        BrokenImageError: for an image that cannot be read, by name, if there is no `broken`.
    """
    share = range(rank, len(images), world)
    batches = [share[first : first + batch_size] for first in range(0, len(share), batch_size)]
    for pixels, labels, problems in load_batches(
        images, preprocessing, size or preprocessing.test_size, batches, workers
    ):
        if problems:
            if broken is None:
                raise BrokenImageError(next(iter(problems.values())))
            broken += problems.values()
            readable = [i for i in range(len(labels)) if i not in problems]
            pixels, labels = pixels[readable], labels[readable]
        if len(labels):
            yield pixels, labels


@dataclass
class _EvaluationSamples(TorchDataset["tuple[Tensor, int] | str"]):
    """Model inputs with labels, or what is wrong with the image."""

    images: Images
    preprocessing: Preprocessing
    size: int

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:  # type: ignore[override]
        try:
            source, label = self.images[index]
            image = open_image(source, channels=len(self.preprocessing.mean))
            return evaluation_transform(image, self.preprocessing, size=self.size), label
        except DataError as error:
            return str(error)

    def collate(self, samples: list[tuple[Tensor, int] | str]) -> EvaluationBatch:
        unreadable = torch.zeros(len(self.preprocessing.mean), self.size, self.size), UNLABELLED
        rows = [unreadable if isinstance(sample, str) else sample for sample in samples]
        return EvaluationBatch(
            torch.stack([pixels for pixels, _ in rows]),
            torch.tensor([label for _, label in rows], dtype=torch.int64),
            {i: sample for i, sample in enumerate(samples) if isinstance(sample, str)},
        )


def _load(
    samples: TorchDataset, batches: Iterable[Sequence[int]], collate: Callable[[list], Any], workers: int
) -> Iterator:
    loader = DataLoader(
        samples,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
    )
    return iter(loader)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
