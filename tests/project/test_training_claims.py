"""The parts of the benchmarks of teachers and of growing images: their networks, and what their pages compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import nfzoo
from benchmarks.claims import distillation, private_training, progressive_sizes
from nfzoo.dp import epsilon
from nfzoo.model import parameter_count


def test_a_student_is_a_tenth_of_its_teacher() -> None:
    assert parameter_count(distillation.student(0).config) < parameter_count(nfzoo.create("nfnet-test").config) / 10


def test_the_page_of_a_teacher_has_differences_of_each_seed() -> None:
    found: list[dict] = [{"way": "the teacher itself", "accuracy": 0.965}]
    for lr in distillation.RATES:
        for seed, (alone, taught) in enumerate(((0.5, 0.6), (0.6, 0.55), (0.7, 0.7))):
            for way, accuracy in zip(distillation.WAYS, (alone, taught), strict=True):
                found.append({"lr": lr, "seed": seed, "way": way, "accuracy": accuracy, "loss": 1 - accuracy})
    text = distillation.page(found, "command")
    assert "| 0.03 | 60.0 % | 61.7 % | +10.0, -5.0, +0.0 | 0.400 | 0.383 |" in text
    assert "96.5 % of the held-out" in text


def test_the_page_of_sizes_has_ratios_of_each_seed() -> None:
    seconds = {"32 pixels": (10, 20, 40), "16, 24, 32 pixels": (9, 10, 30)}
    found = [
        {"way": way, "seed": seed, "seconds": s, "accuracy": 0.99}
        for way, row in seconds.items()
        for seed, s in enumerate(row)
    ]
    text = progressive_sizes.page(found[::-1], "command")
    assert "| 16, 24, 32 pixels | 10 s | 0.75 | 99.00 %, 99.00 %, 99.00 % |" in text
    assert list(progressive_sizes.WAYS) == list(seconds)


@pytest.mark.slow
def test_the_noise_of_private_training_is_the_least_that_epsilon_allows() -> None:
    options = {"rate": 0.01, "steps": 100}
    noise = private_training.noise_for(3.0, **options)
    assert epsilon(noise_multiplier=noise, **options) <= 3 < epsilon(noise_multiplier=0.995 * noise, **options)


@pytest.mark.slow
def test_private_training_runs_and_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "fashion-mnist").mkdir()
    for part, count in (("train", 24), ("t10k", 8)):
        levels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        for kind, array in (("images-idx3", levels), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes()
            (tmp_path / "fashion-mnist" / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    found = private_training.runs(str(tmp_path / "fashion-mnist"), epsilons=(8.0,), epochs=1, batch=12, most=20)
    assert [(row["steps"], row["seed"]) for row in found] == [(2, 0)]
    assert 7.9 < found[0]["epsilon"] <= 8
    found[0] |= {"epsilon": 8.0, "accuracy": 0.8765, "seconds": 12.3, "noise": 0.7}
    assert "| 8.00 | 0.70 | 87.65 % | 12 s |" in private_training.page(found, "command")
