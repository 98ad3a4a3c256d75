"""The curve of a learning-rate range test: the loss at each rate, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WINDOW = 0.1
"""Part of a test's steps over which its losses are averaged: `smooth` forgets a loss at a rate of one over these."""
MARGIN, MARGIN_WITHOUT_AGC = 2.0, 4.0
"""Factors from the suggested rate to that of the lowest smoothed loss: see benchmarks/results/find-lr.md."""
LEAST_FALL = 0.01
"""Part by which the loss has to fall for a rate to be suggested."""
DIVERGED = 4.0
"""Factor of the lowest smoothed loss above which a test ends, as in fastai and Lightning."""


class Curve(NamedTuple):
    """The losses of a range test.

    Attributes:
        clip: the AGC threshold; `None` for none.
        rates: the rate of each step, rising.
        losses: the mean training loss of each step's batch. The last may be NaN, and ends the test.
        smoothed: see `smooth`.
        clipped: the fraction of units that AGC clipped in each step; 0 where nothing is counted.
    """

    clip: float | None
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    clipped: tuple[float, ...]


def rising_rates(start: float, end: float, steps: int) -> tuple[float, ...]:
    """Return `steps` rates from `start` to `end`, each the same factor above the one before."""
    return tuple(float(rate) for rate in np.geomspace(start, end, steps))


def smooth(losses: Sequence[float], steps: int) -> tuple[float, ...]:
    """Return the exponential moving averages of losses, of which `1 - d^t` takes the bias towards 0.

    The decay d is `1 - 1 / (WINDOW steps)`, 0.9 in a test of a hundred `steps`.
    """
    decay = max(0.0, 1 - 1 / (WINDOW * steps))
    average, averages = 0.0, []
    for step, loss in enumerate(losses, start=1):
        average = decay * average + (1 - decay) * loss
        averages.append(average / (1 - decay**step))
    return tuple(averages)


def has_diverged(smoothed: Sequence[float]) -> bool:
    """Return whether the last smoothed loss is not finite, or more than `DIVERGED` times the lowest."""
    return not math.isfinite(smoothed[-1]) or smoothed[-1] > DIVERGED * min(smoothed)


class Suggestion(NamedTuple):
    """A learning rate and an AGC threshold, `None` for none."""

    lr: float
    clip: float | None


def in_words(clip: float | None) -> str:
    """Return a threshold as tables show it."""
    return "null" if clip is None else f"{clip:g}"


def lowest(curve: Curve) -> int:
    """Return the step of a curve's lowest smoothed loss, which NaN is not."""
    return int(np.argmin([loss if math.isfinite(loss) else math.inf for loss in curve.smoothed]))


def suggested_lr(curve: Curve) -> float | None:
    """Return half the rate of the lowest smoothed loss, without AGC a quarter; `None` where the loss never fell.

    It has to fall by `LEAST_FALL` of what it is after a tenth of the steps.
    """
    best = lowest(curve)
    before = curve.smoothed[len(curve.smoothed) // 10]
    if not curve.smoothed[best] <= (1 - LEAST_FALL) * before:
        return None
    return curve.rates[best] / (MARGIN_WITHOUT_AGC if curve.clip is None else MARGIN)


def suggest(curves: Sequence[Curve]) -> Suggestion | None:
    """Return the suggestion of the curve whose smoothed loss is lowest; `None` where none fell."""
    usable = [curve for curve in curves if suggested_lr(curve) is not None]
    if not usable:
        return None
    best = min(usable, key=lambda curve: curve.smoothed[lowest(curve)])
    lr = suggested_lr(best)
    assert lr is not None
    return Suggestion(float(f"{lr:.2g}"), best.clip)
