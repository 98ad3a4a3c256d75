"""Add up what an epoch reports (loss, answers, clipped units, unreadable images), and compare epochs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nfzoo.data.loader import BrokenImageError
from nfzoo.errors import DataError
from nfzoo.runtime.distributed import gather
from nfzoo.train.config import TrainConfig

logger = logging.getLogger("nfzoo")


class Metrics:
    """Sum over an epoch's steps, on the device, so that the host waits only where it reads the sums.

    The tensors stay the same, and are written in place, as a CUDA graph needs it.

    Args:
        kinds: names of the kinds of parameters whose clipped units are counted.
        multi_label: whether targets are sets of labels, of which no right answers are counted.
    """

    def __init__(self, device: torch.device, kinds: Sequence[str] = (), *, multi_label: bool = False) -> None:
        self.device, self.kinds, self.multi_label = device, tuple(kinds), multi_label
        self.clipped_kinds = torch.zeros(len(self.kinds), device=device)
        # In float32 a sum of more than 2**24 images would no longer grow. Apple's GPUs lack float64, TPUs emulate it.
        wide = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
        self.loss_sum, self.correct, self.seen = (self._scalar(dtype=wide) for _ in range(3))
        self.clipped, self.loss, self.norm = (self._scalar() for _ in range(3))

    def _scalar(self, value: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
        # A lazy device writes a 0-dimensional tensor from the host into its program as a constant, and compiles anew
        # for each value. So each is moved with a dimension, and is a tensor of its own.
        return torch.tensor([value], dtype=dtype).to(self.device).reshape(())

    def clear(self) -> None:
        for total in (self.loss_sum, self.correct, self.seen, self.clipped, self.loss, self.norm):
            total.copy_(self._scalar())
        self.clipped_kinds.zero_()

    def restore(self, sums: list[float], clipped: float, kinds: list[float]) -> None:
        """Go on from saved sums. A checkpoint that has none of the `kinds` makes them NaN for the rest of its epoch."""
        saved = kinds if len(kinds) == len(self.kinds) else [math.nan] * len(self.kinds)
        self.clipped_kinds.copy_(torch.tensor(saved))
        for total, value in zip((self.loss_sum, self.correct, self.seen, self.clipped), (*sums, clipped), strict=True):
            total.copy_(self._scalar(value, total.dtype))

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        usable = loss.detach().isfinite()
        self.loss.copy_(loss.detach())
        self.loss_sum.add_(torch.where(usable, self.loss, 0), alpha=len(targets))
        if not self.multi_label:
            labels = targets if targets.ndim == 1 else targets.argmax(1)
            self.correct.add_(usable * (logits.detach().argmax(1) == labels).sum())
        self.seen.add_(usable, alpha=len(targets))

    def add_update(self, norm: Tensor, clipped: Tensor | None, kinds: Tensor | None) -> None:
        """Take the gradient's norm, and add the fractions of units that AGC clipped, of all and of each kind.

        They are `None` where they are not counted.
        """
        self.norm.copy_(norm)
        if clipped is not None:
            self.clipped.add_(clipped)
        if kinds is not None:
            self.clipped_kinds.add_(kinds)

    def clipped_by_kind(self, steps: int) -> dict[str, float]:
        """Return the mean fraction of the units of each kind that `steps` steps clipped, without those not known."""
        means = (self.clipped_kinds / steps).tolist()
        return {f"clipped_{kind}": mean for kind, mean in zip(self.kinds, means, strict=True) if mean == mean}

    def sums(self) -> Tensor:
        """Return loss times images, right answers, and images, of this process."""
        return torch.stack([self.loss_sum, self.correct, self.seen])


class Confusion:
    """Count the answers of a function from images to logits by class, while `evaluate.scores` calls it."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.counts = torch.zeros(classes * classes, dtype=torch.int64)  # of this process
        self._labels = torch.zeros(0, dtype=torch.int64)

    def batches(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of images and labels, of which the function is called with one after the other."""
        for images, labels in batches:
            self._labels = labels.cpu()
            yield images, labels

    def of(self, logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the function, with its answers counted."""

        def counted(images: Tensor) -> Tensor:
            outputs = logits(images)
            cells = self._labels * self.classes + outputs.argmax(1).cpu()
            self.counts += torch.bincount(cells, minlength=len(self.counts))
            return outputs

        return counted


class Best(NamedTuple):
    """The rule by which a run keeps its best epoch.

    The weights that are judged are those that a run saves: their moving average where the recipe keeps one, else the
    live ones.

    Attributes:
        metric: "accuracy", "map" and "f1" are to be high, "loss" low.
        averaged: whether the moving average is judged.
    """

    metric: str
    averaged: bool

    def value(self, row: Mapping[str, Any]) -> float:
        """Return the metric in the figures of an epoch; NaN where it is missing or no number."""
        value = row.get(f"ema_{self.metric}" if self.averaged else self.metric)
        return math.nan if value is None else float(value)

    def row(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """Return the figures of the best epoch, of equal ones the first; `None` if there is no epoch.

        What is no number is worse than any number.
        """
        sign = -1.0 if self.metric == "loss" else 1.0

        def rank(row: Mapping[str, Any]) -> float:
            value = self.value(row)
            return -math.inf if math.isnan(value) else sign * value

        return max(rows, key=rank, default=None)

    def waited(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Return how many epochs have passed since the best one."""
        best = self.row(rows)
        return 0 if best is None else rows[-1]["epoch"] - best["epoch"]


def best_rule(config: TrainConfig) -> Best | None:
    """Return the rule of a run; `None` if it keeps its last epoch."""
    return None if config.keep_best is None else Best(config.keep_best, config.optim.ema_decay is not None)


THRESHOLDS = "thresholds"
"""Key of an epoch's figures: the thresholds that fit the held-out images, see `analysis.multi_label`."""


def without_thresholds(rows: Sequence[dict[str, Any]], rule: Best | None) -> list[dict[str, Any]]:
    """Return the figures of all epochs, with thresholds for the last and the best one alone, as there may be many."""
    kept = rows[-1], None if rule is None else rule.row(rows)
    return [
        row if any(row is one for one in kept) else {k: v for k, v in row.items() if k != THRESHOLDS} for row in rows
    ]


class UnreadableImages:
    """Count a run's images that cannot be read, over all processes, by messages that name them.

    More than `limit` end the run.

    Attributes:
        known: messages that all processes have.
        own: messages of this process since the last `share`, some of which may be known.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.known: set[str] = set()
        self.own: set[str] = set()

    def replace(self, messages: Iterable[str]) -> None:
        """Count images of a training batch that others took the place of; beyond the limit a `BrokenImageError`."""
        for message in messages:
            if message in self.known | self.own:
                continue
            self.own.add(message)
            self._check()
            logger.warning("not readable, and replaced: %s", message)

    def leave_out(self, messages: Iterable[str]) -> None:
        """Count images that an evaluation left out; beyond the limit a `BrokenImageError`."""
        for message in messages:
            if message not in self.known | self.own:
                logger.warning("left out: %s", message)
                self.own.add(message)
        self._check()

    def unknown(self) -> int:
        """Return how many of this process's messages are not known to all."""
        return len(self.own - self.known)

    def check(self, unknown: int) -> None:
        """Raise a `DataError` where known messages and the sum of all processes' `unknown` are beyond the limit."""
        if len(self.known) + unknown > self.limit:
            raise DataError(self._text(len(self.known) + unknown))

    def gathered(self) -> list[str]:
        """Return the messages of all processes, sorted; all of them call this together."""
        return sorted(self.known.union(gather(sorted(self.own))))

    def share(self) -> None:
        """Make all messages known to all processes, which call this together."""
        self.known = set(self.gathered())
        self.own.clear()

    def _check(self) -> None:
        if len(self.known | self.own) > self.limit:
            raise BrokenImageError(self._text(len(self.known | self.own)))

    def _text(self, count: int) -> str:
        names = "; ".join(sorted(self.known | self.own)[-3:])
        if self.limit == 0:
            return f"{names}; --max-broken N lets training go on with up to N such images"
        return f"{count} images cannot be read, and max_broken is {self.limit}; such as: {names}"
