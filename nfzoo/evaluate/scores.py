"""Top-1 and top-5 accuracy, loss and F1 of functions from images to logits, over batches of several processes.

Every image counts once with any number of processes: their integer counts are added before the division.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nfzoo.runtime.device import backend
from nfzoo.runtime.output import escaped


def tells_top5(classes: int) -> bool:
    """Return whether a top-5 accuracy says anything; of five classes or fewer it is always 1."""
    return classes > 5


class Evaluation(NamedTuple):
    """The score of a model on a data set, ready for a model card.

    Attributes:
        model: name of the model, or of its folder.
        dataset, split, matched_by: see `Labelled`.
        classes: number of classes in the data.
        images: number of images that count.
        skipped: number of unreadable images that were left out.
        top1, top5, loss: see `Score`.
        size: side of the input in pixels.
        resize: the rule of the resize, in words.
        nfzoo, torch: versions.
        date: the caller's, never today's, so that a repeated evaluation gives an equal result.
        trained_on: `True` where most of the images are, by the name of the data, those that the model was trained on.
        weights: checksum of the weight file, where it states one.
    """

    model: str
    dataset: str
    split: str | None
    matched_by: str
    classes: int
    images: int
    skipped: int
    top1: float
    top5: float
    loss: float
    size: int
    resize: str
    nfzoo: str
    torch: str
    date: str | None = None
    trained_on: bool | None = None
    weights: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `evaluation.json`, without fields that are `None`."""
        return {key: value for key, value in self._asdict().items() if value is not None}


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


def table(result: Evaluation) -> str:
    """Return an evaluation as lines of text, without the top-5 accuracy of five classes or fewer, which is always 1."""
    scores = {"top-1": result.top1} | ({"top-5": result.top5} if tells_top5(result.classes) else {})
    return "\n".join(lines_of(result, {name: f"{value:7.2%}" for name, value in scores.items()}))


def lines_of(result: Any, figures: Mapping[str, str]) -> list[str]:
    """Return the lines that every evaluation has, with its own figures before the loss."""
    rows = {
        "model": result.model,
        "data": result.dataset if result.split is None else f"{result.dataset}, {result.split}",
        "images": f"{result.images:,}"
        + (f" ({result.skipped:,} cannot be read)" if result.skipped else "")
        + (", most of them trained on" if result.trained_on else ""),
        "classes": f"{result.classes:,}, matched by {result.matched_by}",
        "input": f"{result.size} x {result.size} pixels ({result.resize})",
        **figures,
        "loss": f"{result.loss:7.4f}",
    }
    return [f"{key + ':':<9} {escaped(value)}" for key, value in rows.items()]
