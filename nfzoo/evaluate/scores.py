"""Top-1 and top-5 accuracy, loss and F1 of functions from images to logits, over batches of several processes.

Every image counts once with any number of processes: their integer counts are added before the division.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nfzoo.runtime.device import backend


def tells_top5(classes: int) -> bool:
    """Return whether a top-5 accuracy says anything; of five classes or fewer it is always 1."""
    return classes > 5


class Score(NamedTuple):
    """Top-1 and top-5 accuracy over `images` images, shares in [0, 1], the mean loss, and the macro F1 if asked for."""

    images: int
    top1: float
    top5: float
    loss: float
    f1: float | None = None


def score(
    logits: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str,
    classes: int | None = None,
) -> Score:
    """Score a function from images to logits `(N, classes)`, over the batches of all processes together.

    An image counts as correct in the top k if fewer than k classes rank before its own. Among equal logits the lower
    index ranks first. An image with a NaN among its logits is never correct. The loss is the cross-entropy. All values
    are NaN if there are no images.

    Args:
        classes: number of classes, to compute the macro F1 too: the mean of `2 * right / (predicted + own)` over the
            classes that occur among labels or predictions, each with its numbers of right predictions, of predictions
            and of images of its own. Source: scikit-learn's `f1_score(average="macro")`.
    """
    return scores([logits], batches, device=device, classes=classes)[0]


@torch.no_grad()
def scores(
    functions: Sequence[Callable[[Tensor], Tensor]],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str,
    classes: int | None = None,
) -> list[Score]:
    """Score several functions as `score` does, in one pass over the batches."""
    sums = [_Sums(device, classes) for _ in functions]
    target = backend(device)
    for images, labels in batches:
        images, labels = target.images(images), labels.to(device)
        for logits, each in zip(functions, sums, strict=True):
            each.add(logits(images).float(), labels)
    return [each.score() for each in sums]


class _Sums:
    """What one process adds up for a `Score`."""

    def __init__(self, device: torch.device | str, classes: int | None) -> None:
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # right in the top 1 and 5; seen
        self.by_class = torch.zeros(2, classes or 0, dtype=torch.int64, device=device)  # right; predicted and own
        self.losses: list[Tensor] = []

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Add logits `(N, classes)` and labels `(N,)`."""
        own = outputs.gather(1, labels[:, None])
        index = torch.arange(outputs.shape[1], device=outputs.device)
        behind = (outputs < own) | ((outputs == own) & (index >= labels[:, None]))
        rank = (~behind).sum(1)
        self.counts += torch.stack([(rank < 1).sum(), (rank < 5).sum(), rank.new_tensor(len(labels))])
        if classes := self.by_class.shape[1]:
            hot, predicted = F.one_hot(labels, classes), F.one_hot(outputs.argmax(1), classes)
            self.by_class += torch.stack([(hot * (rank < 1)[:, None]).sum(0), (hot + predicted).sum(0)])
        self.losses.append(F.cross_entropy(outputs, labels, reduction="sum"))

    def score(self) -> Score:
        """Return the score of all processes together."""
        from accelerate.utils import reduce

        # Thousands of losses are added in float64, which Apple's GPUs do not have.
        wide = torch.float32 if self.counts.device.type == "mps" else torch.float64
        zero = torch.zeros((), dtype=wide, device=self.counts.device)
        loss = torch.stack(self.losses).to(wide).sum() if self.losses else zero
        right, right5, seen = reduce(self.counts, reduction="sum").tolist()  # type: ignore[union-attr]
        total = float(reduce(loss, reduction="sum"))  # type: ignore[arg-type]
        f1 = None
        if self.by_class.shape[1]:
            hits, occurred = reduce(self.by_class, reduction="sum").cpu().double()  # type: ignore[union-attr]
            f1 = float((2 * hits / occurred)[occurred > 0].mean())
        if not seen:
            return Score(0, float("nan"), float("nan"), float("nan"), f1)
        return Score(seen, right / seen, right5 / seen, total / seen, f1)
