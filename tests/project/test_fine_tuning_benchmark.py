"""The parts of the fine-tuning benchmark: its data, and what its figures mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.claims import fine_tuning
from nfzoo.data.source import open_split


def test_the_digits_are_as_many_as_it_says(tmp_path: Path) -> None:
    fine_tuning.write_digits(tmp_path / "data", {"5": 6, "7": 2}, 3)
    split = open_split(str(tmp_path / "data"))
    assert split.train.classes == ("5", "7")
    assert torch.bincount(torch.tensor(split.train.labels)).tolist() == [6, 2]
    assert torch.bincount(torch.tensor(split.validation.labels)).tolist() == [3, 3]


def test_a_rise_is_above_the_lowest_point_before() -> None:
    assert fine_tuning.rise([3.0, 1.0, 1.5, 0.5, 0.75]) == 0.5
    assert fine_tuning.rise([3.0, 2.0, 1.0]) == 0


def test_a_classifier_overshoots_above_the_largest_rate() -> None:
    """Equal features, of which half belong to each class: the loss is log 2 at best, and the curvature is known."""
    generator = torch.Generator().manual_seed(0)
    features = torch.ones(320, 50) + 1e-3 * torch.randn(320, 50, generator=generator)
    labels = torch.arange(320) % 2
    eigenvalue, rate = fine_tuning.largest_rate(features, 2)
    assert eigenvalue == pytest.approx(50, rel=1e-3)
    assert rate == pytest.approx(2 * 1.9 / 2.8 * 2 / 50, rel=1e-3)
    parts = {"train": (features, labels), "validation": (features, labels)}
    below, above = (max(fine_tuning.classifier_alone(parts, 2, factor * rate, seed=0)[0]) for factor in (0.5, 20))
    assert below < 0.8
    assert above > 1.5
