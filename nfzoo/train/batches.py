"""Prepare what the steps of a training run take: images, targets and masks on the device, and the held-out images.

All of it depends on the seed, the epoch, the step and the image alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nfzoo.data.digits import DIGITS
from nfzoo.data.loader import TrainingBatch, evaluation_batches, training_batches
from nfzoo.data.source import Split
from nfzoo.errors import ConfigError
from nfzoo.model import sample_noise
from nfzoo.nn import NFNet
from nfzoo.runtime.device import backend, default_workers
from nfzoo.train.config import TrainConfig, default_augment
from nfzoo.transforms.mixing import augment_batch, draw
from nfzoo.transforms.randaugment import send

if TYPE_CHECKING:
    from accelerate import Accelerator  # at run time, only once `device.accelerator` has set it up


class Inputs(NamedTuple):
    """Input of a forward and backward pass, on the device.

    Attributes:
        images: `(n, C, S, S)`, mixed, varied and normalised.
        targets: labels `(n,)`, or where images are mixed shares of classes `(n, classes)`.
        noise: masks of dropout and stochastic depth; empty without either.
    """

    images: Tensor
    targets: Tensor
    noise: dict[str, Tensor]


class InputPipeline:
    """This process's share of a run's data."""

    def __init__(self, config: TrainConfig, split: Split, model: NFNet, accelerator: Accelerator) -> None:
        self.config, self.split, self.device = config, split, accelerator.device
        self.backend = backend(self.device)
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.cfg, self.preprocessing = model.config, model.preprocessing
        self.augment = config.augment or default_augment(config.data)
        self.sizes = training_sizes(config, model.preprocessing.train_size)
        self.workers = _workers(config, self.world)

    def batches(self, epoch: int, start: int, size: int | None = None) -> Iterator[TrainingBatch]:
        """Return the parts of the epoch's batches, from a position on that counts the samples of all processes.

        Args:
            epoch: from 0.
            start: the position.
            size: side of the images in pixels; by default the last of the run.
        """
        if len(self.split.train) - start < self.config.batch_size:  # resumed between last step and evaluation
            return iter(())
        batches = training_batches(
            self.split.train,
            self.preprocessing,
            epoch=epoch,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            rank=self.rank,
            world=self.world,
            accumulation=self.config.accumulation,
            start=start,
            size=size,
            augment=self.augment,
            balanced=self.config.sampler == "balanced",
            workers=self.workers,
            patience=self.config.worker_timeout,
        )
        return self._copied(batches) if self.device.type == "cuda" else batches

    def _copied(self, batches: Iterator[TrainingBatch]) -> Iterator[TrainingBatch]:
        """Copy each batch to the GPU, in a stream of its own, as the GPU still computes the step before."""
        stream = torch.cuda.Stream(self.device)
        for batch in batches:
            with torch.cuda.stream(stream):
                pixels, labels = (t.to(self.device, non_blocking=True) for t in (batch.pixels, batch.labels))
            user = torch.cuda.current_stream(self.device)
            user.wait_stream(stream)
            for tensor in (pixels, labels):
                tensor.record_stream(user)
            yield batch._replace(pixels=pixels, labels=labels)

    def noise(self, step: int) -> dict[str, Tensor]:
        """Draw the masks of a step for the whole batch, of which each process takes its rows."""
        seed = int(np.random.SeedSequence([self.config.seed, step]).generate_state(1, np.uint64)[0] >> 1)
        return sample_noise(self.cfg, self.config.batch_size, generator=torch.Generator().manual_seed(seed))

    def inputs(self, part: TrainingBatch, epoch: int, noise: Mapping[str, Tensor]) -> Inputs:
        """Move a part of a batch to the device, with its rows of the `noise` of the step, and augment it there."""
        draws = draw(
            self.augment,
            seed=self.config.seed,
            epoch=epoch,
            indices=part.indices.numpy(),
            offset=part.offset,
            size=part.pixels.shape[-1],
        )
        # A lazy device would compile anew for each grouping of images by operation.
        device = torch.device("cpu") if self.device.type == "xla" else self.device
        images, targets = augment_batch(
            part.pixels.to(device, non_blocking=True),
            part.labels.to(device, non_blocking=True),
            draws,
            self.augment,
            num_classes=self.cfg.num_classes,
            preprocessing=self.preprocessing,
        )
        images, targets = self.backend.images(images), targets.to(self.device)
        rows = slice(part.offset, part.offset + len(part.labels))
        masks = {name: send(mask[rows], self.device) for name, mask in noise.items()}
        return Inputs(images, targets, masks)

    def held_out(self, broken: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches to evaluate on; `broken` as `evaluation_batches` takes it."""
        return evaluation_batches(
            self.split.validation,
            self.preprocessing,
            batch_size=max(1, self.config.batch_size // self.world),
            rank=self.rank,
            world=self.world,
            workers=self.workers,
            patience=self.config.worker_timeout,
            broken=broken,
        )


def epoch_size(sizes: Sequence[int], epoch: int, epochs: int) -> int:
    """Return the size of an epoch's images, where epochs are divided evenly among sizes; `epoch` counts from 0."""
    return sizes[epoch * len(sizes) // epochs]


def training_sizes(config: TrainConfig, train_size: int) -> tuple[int, ...]:
    """Return the sizes of a run's training images in pixels, in their order; raise a `ConfigError` unless they rise."""
    earlier = config.progressive_sizes or ()
    if earlier and earlier[-1] >= train_size:
        raise ConfigError(
            f"progressive_sizes {list(earlier)!r} come before the model's train_size {train_size}, and must be below "
            "it; leave sizes out, or pass a larger train_size"
        )
    return (*earlier, train_size)


def _workers(config: TrainConfig, processes: int) -> int:
    if config.workers is not None:
        return config.workers
    if config.data == DIGITS:
        return 0
    return default_workers(processes)
