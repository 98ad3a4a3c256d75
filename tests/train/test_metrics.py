"""The sums of an epoch, and the best epoch of a run by its figures."""

from __future__ import annotations

import math
from typing import Any

import torch
from sklearn.metrics import confusion_matrix

from nfzoo.train.config import OptimConfig, TrainConfig
from nfzoo.train.metrics import Best, Confusion, Metrics, best_rule
from tests.support.loops import each


def figures(name: str, values: list[float | None]) -> list[dict[str, Any]]:
    return [{"epoch": i + 1, "step": 10 * (i + 1), name: value} for i, value in enumerate(values)]


@each(
    ("metric", "averaged", "name", "values", "epoch", "waited"),
    [
        ("accuracy", False, "accuracy", [0.5, 0.7, 0.7, 0.6], 2, 2),  # of equal ones the first
        ("loss", False, "loss", [1.0, 0.7, 0.8], 2, 1),
        ("f1", True, "ema_f1", [0.5, 0.4, 0.6], 3, 0),
        ("accuracy", True, "accuracy", [0.5, 0.7], 1, 1),  # live figures count for nothing
        ("loss", False, "loss", [math.nan, 2.0, math.nan, None], 2, 2),
        ("f1", False, "f1", [math.nan, None], 1, 1),
    ],
)
def test_the_best_epoch(
    metric: str, averaged: bool, name: str, values: list[float | None], epoch: int, waited: int
) -> None:
    best, rows = Best(metric, averaged), figures(name, values)
    row = best.row(rows)
    assert row is not None
    assert (row["epoch"], best.waited(rows)) == (epoch, waited)


def test_before_the_first_epoch_there_is_none() -> None:
    assert Best("loss", False).row([]) is None
    assert Best("loss", False).waited([]) == 0


def test_the_saved_weights_are_judged() -> None:
    run = {"model": "nfnet-test", "data": "digits", "output": "x"}
    assert best_rule(TrainConfig(**run)) is None  # type: ignore[arg-type]
    assert best_rule(TrainConfig(**run, keep_best="f1")) == Best("f1", averaged=True)  # type: ignore[arg-type]
    live = OptimConfig(ema_decay=None)
    assert best_rule(TrainConfig(**run, keep_best="loss", optim=live)) == Best("loss", averaged=False)  # type: ignore[arg-type]


def test_sums_of_many_images_go_on_growing() -> None:
    metrics, logits = Metrics(torch.device("cpu")), torch.eye(3)
    metrics.restore([0.125 * 2**30, 2.0**30, 2.0**30], 0.0, [])  # in float32 the next image would be lost
    metrics.add(torch.tensor(0.125), logits, torch.tensor([0, 1, 0]))
    assert metrics.sums().tolist() == [0.125 * (2**30 + 3), 2**30 + 2, 2**30 + 3]


def test_a_confusion_matrix_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(40, 5, generator=generator), torch.randint(5, (40,), generator=generator)
    confusion = Confusion(5)
    answer = confusion.of(lambda x: x)
    for part, _ in confusion.batches(zip(images.split(16), labels.split(16), strict=True)):
        assert torch.equal(answer(part), part)
    expected = confusion_matrix(labels, images.argmax(1), labels=range(5))
    assert confusion.counts.reshape(5, 5).tolist() == expected.tolist()
