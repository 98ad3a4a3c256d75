"""Choose the options of a run that depend on its data, where nobody gave them: batch size and epochs.

They are chosen once, before the first step. Checkpoints and `train.yaml` hold the numbers, so that a resumed run has
the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from nfzoo.train.config.train_config import CHOSEN, OptimConfig, TrainConfig, default_augment, default_lr

BATCHES = (32, 16, 8)
EPOCHS = 15
LARGE = 1024
"""Images in a batch from which on the papers' AGC threshold is meant: arXiv 2102.06171, section 4.1."""
STEPS = 100
"""Steps below which a run on little data gains from smaller batches: benchmarks/results/run-lengths.md."""


class Choice(NamedTuple):
    """A run with nothing left open, and a line about each option that was chosen."""

    config: TrainConfig
    lines: tuple[str, ...]


def chosen(config: TrainConfig, images: int, processes: int, earlier: Mapping[str, Any] | None = None) -> Choice:
    """Return a run with a batch size and a number of epochs.

    The batch size is the largest of 32, 16 and 8 with which 15 epochs have a hundred steps, or 8. It is rounded up to
    a multiple of the parts into which processes, accumulated steps and mixed pairs divide it. The epochs are 15, or as
    many as take a hundred steps.

    Args:
        config: the run. What it gives stays.
        images: the number of training images.
        processes: the number of processes.
        earlier: the options of the run that this one goes on with, which has chosen.
    """
    if earlier is not None:
        given = {name: earlier[name] for name in CHOSEN if getattr(config, name) is None and name in earlier}
        config = dataclasses.replace(config, **given)
    lines = []
    if config.batch_size is None:
        batch = next((b for b in BATCHES if EPOCHS * (images // b) >= STEPS), BATCHES[-1])
        mixes = (config.augment or default_augment(config.data)).mixes
        parts = processes * (config.accumulation or 1) * (2 if mixes else 1)
        batch = -(-batch // parts) * parts
        config = dataclasses.replace(config, batch_size=batch)
        steps = images // batch
        lines.append(f"batch size {batch}, as {images:,} images then make {steps} step{'s' * (steps != 1)} an epoch")
    if config.epochs is None:
        steps = max(1, images // config.batch_size)
        needed = -(-STEPS // steps)
        config = dataclasses.replace(config, epochs=max(EPOCHS, needed))
        reason = f"at least {STEPS} steps" if needed > EPOCHS else f"which are {EPOCHS * steps:,} steps"
        lines.append(f"epochs {config.epochs}, {reason}")
    return Choice(config, tuple(lines))


def reasons(config: TrainConfig, pretrained: bool) -> list[str]:
    """Return a line each about a learning rate that was not given, and about the default AGC threshold.

    Args:
        config: the run, with a batch size.
        pretrained: whether it begins with pretrained weights.
    """
    optim, lines = config.optim, []
    if optim.lr is None:
        lr = default_lr(config.batch_size, pretrained, optim.name)
        rule = f"the default of {optim.name}"
        if optim.name == "sgd":
            rule = "as 0.1 is for batches of 64 to 256, and in proportion outside"
        lines.append(f"learning rate {lr:g}, {rule}{', and a tenth from pretrained weights' if pretrained else ''}")
    if optim.clip == OptimConfig.clip:
        large = f"; the papers' 0.01 is for larger ones, as {config.batch_size:,}" if config.batch_size >= LARGE else ""
        lines.append(f"AGC threshold {optim.clip:g}, which is for batches below {LARGE}{large}")
    return lines
