"""Measures of a classifier from its logits, and their confidence intervals, in numpy alone.

All sums are in float64. Logits are `(n, classes)` and finite, labels `(n,)` are indices of the classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BINS = 15
"""Bins of equal width for the expected calibration error, as in arXiv 1706.04599."""

RESAMPLES = 1000
LEVEL = 0.95

LOWEST, HIGHEST = 0.01, 100.0
"""Between these, `fit_temperature` searches."""

_CELLS = 1 << 21  # of the logits that are computed with at a time, as float64 takes twice their memory


class ImageScores(NamedTuple):
    """Hold the measures of each image, arrays `(n,)`.

    Attributes:
        prediction: the most probable class, int64; the lowest index among equals.
        confidence: its probability.
        rank: number of classes in front of the image's own, int64; among equal logits the lower index is in front.
        nll: negative log-likelihood of the image's own class.
        brier: sum over the classes of `(probability - 1[own class])**2`, in [0, 2].
    """

    prediction: np.ndarray
    confidence: np.ndarray
    rank: np.ndarray
    nll: np.ndarray
    brier: np.ndarray


def image_scores(logits: np.ndarray, labels: np.ndarray, temperature: float | np.ndarray = 1.0) -> ImageScores:
    """Measure each image, with the probabilities `softmax(logits / temperature)`.

    Args:
        logits: of all images.
        labels: of all images.
        temperature: one for all images, or one for each `(n,)`.

    Source of the Brier score: Brier 1950, in its original form for several classes.
    """
    n = len(labels)
    scores = ImageScores(*(np.zeros(n, kind) for kind in (np.int64, float, np.int64, float, float)))
    each = np.broadcast_to(np.asarray(temperature, np.float64), (n,))
    for part in _parts(logits):
        z, own = logits[part].astype(np.float64), labels[part]
        rows, index = np.arange(len(own)), np.arange(z.shape[1])
        mine = z[rows, own][:, None]
        scores.rank[part] = ((z > mine) | ((z == mine) & (index < own[:, None]))).sum(1)
        scores.prediction[part] = first = z.argmax(1)
        log_p = log_softmax(z / each[part][:, None])
        p = np.exp(log_p)
        scores.confidence[part] = p[rows, first]
        scores.nll[part] = -log_p[rows, own]
        scores.brier[part] = (p**2).sum(1) - 2 * p[rows, own] + 1
    return scores


def log_softmax(z: np.ndarray) -> np.ndarray:
    """Return the logarithms of the softmax over the last dimension, of finite float64 logits."""
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _parts(logits: np.ndarray) -> Iterator[slice]:
    step = max(1, _CELLS // max(1, logits.shape[1]))
    for first in range(0, len(logits), step):
        yield slice(first, first + step)


# -- classes


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Count the images of each class (rows) by the class that was predicted (columns), int64 `(classes, classes)`."""
    return np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)


class ClassScores(NamedTuple):
    """Measures of each class, arrays `(classes,)`; a quotient with a divisor of 0 is 0.

    Attributes:
        precision: share of the images predicted as the class that are of it.
        recall: share of the images of the class that are predicted as it.
        f1: harmonic mean of both, `2 * right / (predicted + support)`.
        support: number of images of the class.
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray

    def macro(self) -> tuple[float, float, float]:
        """Return the means of precision, recall and F1 over the classes that have images."""
        seen = self.support > 0
        return float(self.precision[seen].mean()), float(self.recall[seen].mean()), float(self.f1[seen].mean())


def class_scores(confusion: np.ndarray) -> ClassScores:
    """Return the measures of each class of a confusion matrix."""
    return _class_scores(confusion.diagonal(), confusion.sum(0), confusion.sum(1))


def _class_scores(right: np.ndarray, predicted: np.ndarray, support: np.ndarray) -> ClassScores:
    precision, recall = right / np.maximum(predicted, 1), right / np.maximum(support, 1)
    return ClassScores(precision, recall, 2 * right / np.maximum(predicted + support, 1), support)


def confusions(confusion: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """Return the `count` most frequent mistakes as (class, predicted class, images), the most frequent first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = zip(*(axis.tolist() for axis in np.unravel_index(order, wrong.shape)), strict=True)
    return [(a, b, int(wrong[a, b])) for a, b in pairs if wrong[a, b]]


# -- calibration


class Calibration(NamedTuple):
    """Compare the probabilities of the predicted classes with the share of right predictions.

    Attributes:
        ece: expected calibration error, the mean over images of `|accuracy - confidence|` of their bin.
        mce: the greatest such difference of any bin.
        nll, brier: means over the images: see `ImageScores`.
        counts: images of each bin, int64 `(bins,)`; the bin i of n is `(i / n, (i + 1) / n]`.
        confidence, accuracy: means over the images of each bin, `(bins,)`; NaN for an empty one.

    Source: arXiv 1706.04599, section 2.
    """

    ece: float
    mce: float
    nll: float
    brier: float
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def calibration(scores: ImageScores, *, bins: int = BINS) -> Calibration:
    """Measure the calibration of at least one image, in bins of equal width."""
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    index = np.searchsorted(inner, scores.confidence)
    counts = np.bincount(index, minlength=bins)
    filled = np.where(counts, counts, np.nan)
    confidence = np.bincount(index, scores.confidence, bins) / filled
    accuracy = np.bincount(index, scores.rank == 0, bins) / filled
    gaps = np.nan_to_num(np.abs(accuracy - confidence))
    ece = float(counts @ gaps / counts.sum())
    means = float(scores.nll.mean()), float(scores.brier.mean())
    return Calibration(ece, float(gaps.max()), *means, counts, confidence, accuracy)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the temperature T that minimises the mean negative log-likelihood of `softmax(logits / T)`.

    The likelihood is convex in b = 1 / T. Its derivative, the mean of `E[logit] - own logit`, has the variance of the
    logits as slope, so Newton's method finds its zero, within an interval that shrinks.

    Returns:
        `None` if there is no minimum between `LOWEST` and `HIGHEST`: all predictions are right, or they are no better
        than chance.

    Source: arXiv 1706.04599, section 4.2.
    """
    if not len(labels):
        return None
    low, high = 1 / HIGHEST, 1 / LOWEST
    if _slope(logits, labels, low)[0] >= 0 or _slope(logits, labels, high)[0] <= 0:
        return None
    b = 1.0
    for _ in range(200):
        slope, curvature = _slope(logits, labels, b)
        low, high = (b, high) if slope < 0 else (low, b)
        step = b - slope / curvature if curvature > 0 else low
        after = step if low < step < high else (low * high) ** 0.5
        if abs(after - b) <= 1e-12 * b:
            break
        b = after
    return 1 / b


def _slope(logits: np.ndarray, labels: np.ndarray, b: float) -> tuple[float, float]:
    """Return first and second derivative by b of the mean negative log-likelihood of `softmax(b * logits)`."""
    first = second = 0.0
    for part in _parts(logits):
        z = logits[part].astype(np.float64)
        p = np.exp(log_softmax(b * z))
        mean = (p * z).sum(1)
        first += float((mean - z[np.arange(len(z)), labels[part]]).sum())
        second += float((p * (z - mean[:, None]) ** 2).sum())
    return first / len(labels), second / len(labels)


def cross_fitted_temperatures(logits: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> np.ndarray | None:
    """Return for each image the temperature that fits the half of the images without it, `(n,)`.

    What is measured with these temperatures is measured on images that took no part in the fit. The halves are drawn
    by the seed.

    Returns:
        `None` if one half has no such temperature: see `fit_temperature`.
    """
    n = len(labels)
    order = np.random.default_rng(seed).permutation(n)
    halves = order[: n // 2], order[n // 2 :]
    temperatures = np.empty(n)
    for fitted, measured in (halves, halves[::-1]):
        value = fit_temperature(logits[fitted], labels[fitted])
        if value is None:
            return None
        temperatures[measured] = value
    return temperatures


# -- confidence intervals


class Summary(NamedTuple):
    """Means over the images, or over the classes that have images: see `ImageScores` and `ClassScores`."""

    top1: float
    top5: float
    precision: float
    recall: float
    f1: float
    nll: float
    brier: float


def summarize(scores: ImageScores, labels: np.ndarray, classes: int, counts: np.ndarray | None = None) -> Summary:
    """Return the means, where each image counts as often as `counts` `(n,)` says, by default once."""
    w = np.ones(len(labels)) if counts is None else counts
    total, right = w.sum(), scores.rank == 0
    by_class = _class_scores(
        np.bincount(labels, w * right, classes),
        np.bincount(scores.prediction, w, classes),
        np.bincount(labels, w, classes),
    )
    return Summary(
        float(w @ right / total),
        float(w @ (scores.rank < 5) / total),
        *by_class.macro(),
        float(w @ scores.nll / total),
        float(w @ scores.brier / total),
    )


def bootstrap(
    scores: ImageScores,
    labels: np.ndarray,
    classes: int,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[Summary, Summary]:
    """Return the lower and upper ends of confidence intervals, by the percentile bootstrap over images.

    As many images as there are, drawn with replacement, are summarised `resamples` times. An interval reaches between
    the quantiles `(1 - level) / 2` and `(1 + level) / 2` of a measure. It tells of the choice of images alone, not of
    another training.

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    rng, n = np.random.default_rng(seed), len(labels)
    drawn = (np.bincount(rng.integers(n, size=n), minlength=n).astype(float) for _ in range(resamples))
    table = np.array([summarize(scores, labels, classes, counts) for counts in drawn])
    low, high = np.quantile(table, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Summary(*low.tolist()), Summary(*high.tolist())
