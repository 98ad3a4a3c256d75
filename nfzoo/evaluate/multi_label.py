"""Scores of multi-label classifiers over batches of several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nfzoo.analysis import multi_label as measures
from nfzoo.runtime.device import backend
from nfzoo.runtime.distributed import gather


class SetScore(NamedTuple):
    """What functions from images to logits are worth on multi-label data.

    Attributes:
        images: number of images.
        loss: binary cross-entropy, the mean over images and classes.
        map: mean average precision, over the classes that an image has.
        f1, micro_f1: macro and micro F1 with thresholds of 0.5.
        thresholds: those that maximise the F1 of each class on these images; `None` if a logit is not finite.
    """

    images: int
    loss: float
    map: float
    f1: float
    micro_f1: float
    thresholds: tuple[float, ...] | None


@torch.no_grad()
def set_scores(
    functions: Sequence[Callable[[Tensor], Tensor]],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str,
) -> list[SetScore]:
    """Score several functions from images to logits `(N, classes)`, over the batches of all processes together.

    Every process holds the logits of all images in its memory. If one is not finite, loss and mean average precision
    are NaN.

    Args:
        batches: images and, bool `(N, classes)`, whether they have each label.
    """
    kept: list[list[np.ndarray]] = [[] for _ in functions]
    known: list[np.ndarray] = []
    target = backend(device)
    for images, labels in batches:
        images = target.images(images)
        known.append(labels.cpu().numpy())
        for logits, own in zip(functions, kept, strict=True):
            own.append(logits(images).float().cpu().numpy())
    parts = gather([(known, kept)])
    targets = np.concatenate([batch for own, _ in parts for batch in own] or [np.zeros((0, 1), bool)])
    return [
        _score(np.concatenate([batch for _, own in parts for batch in own[k]] or [np.zeros((0, 1))]), targets)
        for k in range(len(functions))
    ]


def _score(logits: np.ndarray, targets: np.ndarray) -> SetScore:
    if not np.isfinite(logits).all():
        nan = float("nan")
        return SetScore(len(logits), nan, nan, nan, nan, None)
    at_half = measures.label_scores(logits, targets, np.full(logits.shape[1], 0.5))
    return SetScore(
        len(logits),
        measures.mean_loss(measures.image_losses(logits, targets)),
        measures.mean_over_known(measures.average_precisions(logits, targets)),
        at_half.macro_f1(),
        at_half.micro_f1(),
        measures.fit_thresholds(logits, targets),
    )
