"""The parts of the benchmarks of teachers and of growing images: their networks, and what their pages compute."""

from __future__ import annotations

import nfzoo
from benchmarks.claims import distillation, progressive_sizes
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
