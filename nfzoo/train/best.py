"""Find a run's best epoch by a metric of the held-out images, and how long no better one has come."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nfzoo.train.config import TrainConfig


class Best(NamedTuple):
    """The rule by which a run keeps its best epoch.

    The weights that are judged are those that a run saves: their moving average where the recipe keeps one, else the
    live ones.

    Attributes:
        metric: "accuracy" and "f1" are to be high, "loss" low.
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


def rule(config: TrainConfig) -> Best | None:
    """Return the rule of a run; `None` if it keeps its last epoch."""
    return None if config.keep_best is None else Best(config.keep_best, config.optim.ema_decay is not None)
