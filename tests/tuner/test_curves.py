"""What follows from the losses of a range test."""

from __future__ import annotations

import math

import pytest

from nfzoo.tuner.curves import Curve, Suggestion, has_diverged, lowest, rising_rates, smooth, suggest, suggested_lr


def curve(*smoothed: float, clip: float | None = 0.1) -> Curve:
    rates = rising_rates(0.001, 10.0, len(smoothed))
    return Curve(clip, rates, smoothed, smoothed, (0.0,) * len(smoothed))


def test_rates_rise_by_one_factor() -> None:
    rates = rising_rates(1e-4, 10.0, 6)
    assert rates == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])


def test_smoothing_is_a_weighted_mean() -> None:
    losses = [3.0, 1.0, 4.0, 1.5]
    expected = []
    for t in range(len(losses)):
        weights = [0.9 ** (t - i) for i in range(t + 1)]
        expected.append(sum(w * loss for w, loss in zip(weights, losses, strict=False)) / sum(weights))
    assert smooth(losses, 100) == pytest.approx(expected)
    assert math.isnan(smooth([1.0, math.nan], 100)[1])
    assert smooth(losses, 10) == tuple(losses)


def test_a_loss_has_diverged_at_four_times_the_lowest() -> None:
    assert not has_diverged([2.0, 0.5, 1.9])
    assert has_diverged([2.0, 0.5, 2.1])
    assert has_diverged([2.0, math.nan])
    assert has_diverged([2.0, math.inf])


def test_the_threshold_with_the_lowest_loss_is_suggested() -> None:
    flat = curve(2.0, 2.0, 1.999, 2.0, 3.0, clip=0.01)
    falls = curve(2.0, 1.9, 1.2, 1.8, 3.0, clip=0.1)
    lower = curve(2.0, 1.9, 1.4, 1.1, math.nan, clip=None)
    assert lowest(falls) == 2
    assert lowest(lower) == 3
    assert suggested_lr(flat) is None
    assert suggested_lr(falls) == pytest.approx(0.1 / 2)
    assert suggest([flat, falls, lower]) == Suggestion(0.25, None)
    assert suggest([flat, falls]) == Suggestion(0.05, 0.1)
    assert suggest([flat]) is None
    assert suggest([curve(math.nan)]) is None
