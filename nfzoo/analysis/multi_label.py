"""Measures of a multi-label classifier from its logits, and the thresholds that fit them, in numpy alone.

Logits are `(n, classes)`. Targets are bool `(n, classes)`: whether an image has a label. No measure depends on the
order of the images, nor therefore on the number of processes that computed them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nfzoo.analysis.classification import LEVEL, RESAMPLES


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of labels, float64."""
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))


def image_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the binary cross-entropy of each image, the mean over its classes, float64 `(n,)`."""
    return np.logaddexp(0.0, np.where(targets, -logits.astype(np.float64), logits)).mean(1)


def mean_loss(losses: np.ndarray) -> float:
    """Return the mean over the images, added in rising order; NaN for none."""
    return float(np.sort(losses).sum() / len(losses)) if len(losses) else float("nan")


def average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Return the average precision of one class, NaN if no image has it.

        sum_k (recall_k - recall_{k - 1}) precision_k

    k runs over the different scores, from the highest down: images of equal scores are found together.

    Args:
        scores: `(n,)`, high where the label is likely; without NaN.
        targets: whether an image has the label, bool `(n,)`.

    Source: scikit-learn's `average_precision_score`.
    """
    if not targets.any():
        return float("nan")
    order, last = _Ranking.of(scores)
    right = np.cumsum(targets[order])[last]
    return float((np.diff(right, prepend=0) / right[-1]) @ (right / (last + 1)))


def average_precisions(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the average precision of each class, `(classes,)`; NaN where no image has it."""
    return np.array([average_precision(logits[:, c], targets[:, c]) for c in range(logits.shape[1])])


def mean_over_known(values: np.ndarray) -> float:
    """Return the mean of the values that are numbers; NaN if none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


class _Ranking(NamedTuple):
    """The images of one class from the highest score down, and the last of each group of equal scores."""

    order: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray) -> _Ranking:
        order = np.argsort(-scores)
        ordered = scores[order]
        return cls(order, np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)))


def best_threshold(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Return the threshold of one class that maximises its F1; 0.5 if no image has the label.

    It lies halfway between two neighbouring probabilities, or is the higher one where float32 has nothing between. Of
    equally good ones it is the nearest to 0.5.

    Args:
        probabilities: `(n,)`, float32, as they are compared with it.
        targets: whether an image has the label, bool `(n,)`.
    """
    if not targets.any():
        return 0.5
    order, last = _Ranking.of(probabilities)
    ordered, hits = probabilities[order], np.cumsum(targets[order])
    f1 = 2 * hits[last] / (last + 1 + hits[-1])
    below = np.append(ordered[last[1:]], np.float32(0))
    middle = below + (ordered[last] - below) / 2
    best = np.where(middle > below, middle, ordered[last])[f1 == f1.max()]
    return float(best[np.abs(best - 0.5).argmin()])


def fit_thresholds(logits: np.ndarray, targets: np.ndarray) -> tuple[float, ...]:
    """Return for each class the threshold of the sigmoids that maximises its F1 on these images: see `best_threshold`.

    That F1 is optimistic, as the thresholds saw its images.
    """
    probabilities = sigmoid(logits).astype(np.float32)  # very large logits are equally probable there
    return tuple(best_threshold(probabilities[:, c], targets[:, c]) for c in range(logits.shape[1]))


class LabelScores(NamedTuple):
    """Measures of each class at its threshold, arrays `(classes,)`; a quotient with a divisor of 0 is 0.

    Attributes:
        precision, recall, f1: as of each class by itself.
        support: number of images that have the label, int64.
        predicted: number of images that get it, int64.
        right: number of those that have it among them, int64.
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray
    predicted: np.ndarray
    right: np.ndarray

    def macro_f1(self) -> float:
        """Return the mean F1 of the classes that occur among labels or predictions; NaN if none does."""
        occurs = self.support + self.predicted > 0
        return mean_over_known(np.where(occurs, self.f1, np.nan))

    def micro_f1(self) -> float:
        """Return the F1 of all pairs of image and label together; NaN if no label occurs."""
        both = self.support.sum() + self.predicted.sum()
        return float(2 * self.right.sum() / both) if both else float("nan")


def label_scores(
    logits: np.ndarray, targets: np.ndarray, thresholds: np.ndarray, counts: np.ndarray | None = None
) -> LabelScores:
    """Return the measures of each class, where an image has the labels whose sigmoids reach their thresholds.

    Args:
        logits, targets: of all images.
        thresholds: `(classes,)`.
        counts: how often each image counts, `(n,)`; by default once.
    """
    found = sigmoid(logits).astype(np.float32) >= np.asarray(thresholds, np.float32)
    each = np.ones(len(logits), np.int64) if counts is None else counts
    right, predicted, support = (each @ pairs.astype(np.int64) for pairs in (found & targets, found, targets))
    precision, recall = right / np.maximum(predicted, 1), right / np.maximum(support, 1)
    return LabelScores(precision, recall, 2 * right / np.maximum(predicted + support, 1), support, predicted, right)


# -- confidence intervals


class SetSummary(NamedTuple):
    """Measures of all classes together: see `average_precisions`, `LabelScores` and `image_losses`."""

    map: float
    f1: float
    micro_f1: float
    loss: float


def summarize_sets(logits: np.ndarray, targets: np.ndarray, thresholds: np.ndarray) -> SetSummary:
    """Return the measures of all classes together."""
    by_class = label_scores(logits, targets, thresholds)
    known = mean_over_known(average_precisions(logits, targets))
    return SetSummary(known, by_class.macro_f1(), by_class.micro_f1(), mean_loss(image_losses(logits, targets)))


def bootstrap_sets(
    logits: np.ndarray,
    targets: np.ndarray,
    thresholds: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[SetSummary, SetSummary]:
    """Return the lower and upper ends of confidence intervals, by the percentile bootstrap over images.

    See `classification.bootstrap`. A class that a resample lacks is left out of its mean average precision.
    """
    rng, n = np.random.default_rng(seed), len(logits)
    counts = np.array([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples)])
    precisions = np.full((resamples, logits.shape[1]), np.nan)
    for c in np.flatnonzero(targets.any(0)).tolist():
        precisions[:, c] = _resampled_precision(logits[:, c], targets[:, c], counts)
    found = sigmoid(logits).astype(np.float32) >= np.asarray(thresholds, np.float32)
    right, predicted, support = (counts @ pairs.astype(np.int64) for pairs in (found & targets, found, targets))
    both = predicted + support
    f1 = np.where(both > 0, 2 * right / np.maximum(both, 1), np.nan)
    columns = (
        np.array([mean_over_known(row) for row in precisions]),
        np.array([mean_over_known(row) for row in f1]),
        2 * right.sum(1) / np.maximum(both.sum(1), 1),
        counts @ image_losses(logits, targets) / n,
    )
    low, high = np.nanquantile(np.array(columns), [(1 - level) / 2, (1 + level) / 2], axis=1)
    return SetSummary(*low.tolist()), SetSummary(*high.tolist())


def _resampled_precision(scores: np.ndarray, targets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the average precision of one class where images count as often as each row of `counts` says."""
    order, last = _Ranking.of(scores)
    values = np.empty(len(counts))
    for k, each in enumerate(counts[:, order]):
        seen, right = np.cumsum(each)[last], np.cumsum(each * targets[order])[last]
        shares = np.diff(right, prepend=0) / right[-1] if right[-1] else np.full(len(right), np.nan)
        values[k] = shares @ (right / np.maximum(seen, 1))
    return values
