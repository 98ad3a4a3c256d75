"""Measures of a classifier, against scikit-learn's and scipy's, and against sums by hand."""

import warnings

import numpy as np
import pytest

from nfzoo.analysis import classification
from nfzoo.analysis.classification import (
    ImageScores,
    bootstrap,
    calibration,
    class_scores,
    confusion_matrix,
    confusions,
    cross_fitted_temperatures,
    fit_temperature,
    image_scores,
    summarize,
)

ROUNDING = 1e-12  # of sums of a thousand terms of order one in float64
STEP = 1e-9  # Newton's last step is below 1e-12, and rounding of the slope adds to it
FLAT = 1e-5  # a minimum is this flat: scipy finds it by values, which float64 rounds


def example(n: int = 600, classes: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are right about half the time and too sure; class 5 has no images, and class 6 is never predicted."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, 3, 4, 6], n)
    logits = rng.normal(size=(n, classes)) * 3
    logits[np.arange(n), labels] += 3
    logits[:, 6] = -6
    return logits.astype(np.float32), labels


def softmax(logits: np.ndarray) -> np.ndarray:
    from scipy.special import softmax

    return softmax(logits.astype(np.float64), axis=1)


def test_classes_are_scored_as_by_sklearn() -> None:
    from sklearn import metrics

    logits, labels = example()
    found = image_scores(logits, labels)
    predictions = logits.argmax(1)
    assert np.array_equal(found.prediction, predictions)
    matrix = confusion_matrix(labels, found.prediction, 7)
    assert np.array_equal(matrix, metrics.confusion_matrix(labels, predictions, labels=range(7)))
    rows = class_scores(matrix)
    expected = metrics.precision_recall_fscore_support(labels, predictions, labels=range(7), zero_division=0)  # type: ignore[arg-type]
    for ours, theirs in zip(rows, expected, strict=True):  # type: ignore[call-overload]
        assert ours == pytest.approx(theirs, abs=ROUNDING)
    present = [0, 1, 2, 3, 4, 6]
    macro = metrics.precision_recall_fscore_support(
        labels,
        predictions,
        labels=present,
        average="macro",
        zero_division=0,  # type: ignore[arg-type]
    )
    assert rows.macro() == pytest.approx(macro[:3], abs=ROUNDING)
    summary = summarize(found, labels, 7)
    assert summary[2:5] == pytest.approx(macro[:3], abs=ROUNDING)
    assert summary.top1 == pytest.approx(metrics.accuracy_score(labels, predictions), abs=ROUNDING)
    top5 = metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(7))
    assert summary.top5 == pytest.approx(top5, abs=ROUNDING)
    assert 0 < summary.top1 < summary.top5 < 1
    assert summary.nll == pytest.approx(metrics.log_loss(labels, softmax(logits), labels=range(7)), abs=ROUNDING)
    brier = metrics.brier_score_loss(labels, softmax(logits), labels=range(7), scale_by_half=False)  # type: ignore[arg-type]
    assert summary.brier == pytest.approx(brier, abs=ROUNDING)


def test_counts_repeat_images() -> None:
    logits, labels = example(50)
    counts = np.random.default_rng(1).integers(0, 4, 50)
    repeated = np.repeat(np.arange(50), counts)
    found = summarize(image_scores(logits, labels), labels, 7, counts.astype(float))
    expected = summarize(image_scores(logits[repeated], labels[repeated]), labels[repeated], 7)
    assert found == pytest.approx(expected, abs=ROUNDING)


def test_equal_logits_rank_by_index() -> None:
    found = image_scores(np.zeros((3, 8)), np.array([0, 4, 5]))
    assert (found.prediction.tolist(), found.rank.tolist()) == ([0, 0, 0], [0, 4, 5])


def test_the_most_frequent_mistakes() -> None:
    matrix = np.array([[9, 2, 0], [2, 9, 3], [0, 0, 9]])
    assert confusions(matrix, 2) == [(1, 2, 3), (0, 1, 2)]
    assert confusions(matrix, 9) == [(1, 2, 3), (0, 1, 2), (1, 0, 2)]
    assert matrix[0, 0] == 9


def test_parts_of_the_logits_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = example(100)
    whole, fitted = image_scores(logits, labels, 2.5), fit_temperature(logits, labels)
    monkeypatch.setattr(classification, "_CELLS", 50)
    for a, b in zip(image_scores(logits, labels, np.full(100, 2.5)), whole, strict=True):
        assert np.array_equal(a, b)
    assert fit_temperature(logits, labels) == pytest.approx(fitted, rel=STEP)


# -- calibration


def test_bins_are_those_of_sklearn() -> None:
    from sklearn.calibration import calibration_curve

    logits, labels = example()
    scores = image_scores(logits, labels)
    right = scores.rank == 0
    found = calibration(scores, bins=10)
    accuracy, confidence = calibration_curve(right, scores.confidence, n_bins=10)
    filled = found.counts > 0
    assert 0 < filled.sum() < 10
    assert found.accuracy[filled] == pytest.approx(accuracy, abs=ROUNDING)
    assert found.confidence[filled] == pytest.approx(confidence, abs=ROUNDING)
    assert np.isnan(found.accuracy[~filled]).all()
    assert found.ece == pytest.approx((found.counts[filled] / 600) @ np.abs(accuracy - confidence), abs=ROUNDING)
    assert found.mce == pytest.approx(np.abs(accuracy - confidence).max(), abs=ROUNDING)


def test_calibration_error_by_hand() -> None:
    # Two images with confidence 0.75, of which one is right; one with 0.5, right, which the lower bin holds.
    confidence, rank = np.array([0.75, 0.75, 0.5]), np.array([0, 2, 0])
    zero = np.zeros(3)
    found = calibration(ImageScores(rank, confidence, rank, zero, zero), bins=2)
    assert found.counts.tolist() == [1, 2]
    assert found.ece == pytest.approx((1 * 0.5 + 2 * 0.25) / 3)
    assert found.mce == pytest.approx(0.5)


def test_temperature_has_the_least_loss_that_scipy_finds() -> None:
    from scipy.optimize import minimize_scalar
    from sklearn.metrics import log_loss

    for seed, scale in ((0, 1), (1, 0.1), (2, 10)):
        logits, labels = example(seed=seed)
        logits = logits.astype(np.float64) * scale
        found = fit_temperature(logits, labels)
        assert found is not None

        def loss(t: float, logits: np.ndarray = logits, labels: np.ndarray = labels) -> float:
            return log_loss(labels, softmax(logits / t), labels=range(7))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            best = minimize_scalar(loss, bounds=(0.02, 90), method="bounded", options={"xatol": 1e-8})
        assert found == pytest.approx(best.x, rel=FLAT)  # type: ignore[union-attr]
        assert loss(found) <= best.fun + ROUNDING  # type: ignore[union-attr]
        assert image_scores(logits, labels, found).nll.mean() == pytest.approx(loss(found), abs=ROUNDING)


def test_sklearn_fits_the_same_temperature() -> None:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator

    class Identity(ClassifierMixin, BaseEstimator):
        def fit(self, x: np.ndarray, y: np.ndarray) -> "Identity":
            self.classes_ = np.unique(y)
            return self

        def decision_function(self, x: np.ndarray) -> np.ndarray:
            return x

        def predict(self, x: np.ndarray) -> np.ndarray:
            return x.argmax(1)

    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 400)
    logits = 3 * rng.normal(size=(400, 4)) + 3 * np.eye(4)[labels]
    theirs = CalibratedClassifierCV(FrozenEstimator(Identity().fit(logits, labels)), method="temperature").fit(
        logits, labels
    )
    found = fit_temperature(logits, labels)
    assert found is not None
    assert softmax(logits / found) == pytest.approx(theirs.predict_proba(logits), abs=1e-4)


def test_no_temperature_where_sure_is_never_too_sure_or_a_guess_is_as_good() -> None:
    right = 5 * np.eye(3)
    assert fit_temperature(right, np.arange(3)) is None
    assert fit_temperature(right, np.array([1, 2, 0])) is None
    assert fit_temperature(np.zeros((3, 3)), np.arange(3)) is None
    assert fit_temperature(np.zeros((0, 3)), np.arange(0)) is None
    assert cross_fitted_temperatures(right, np.arange(3)) is None


def test_each_image_gets_the_temperature_of_the_other_half() -> None:
    logits, labels = example(101)
    found = cross_fitted_temperatures(logits, labels, seed=5)
    assert found is not None
    halves = [np.flatnonzero(found == value) for value in np.unique(found)]
    assert sorted(map(len, halves)) == [50, 51]
    for half in halves:
        rest = np.setdiff1d(np.arange(101), half)
        assert found[half[0]] == pytest.approx(fit_temperature(logits[rest], labels[rest]), rel=STEP)


# -- confidence intervals


def test_intervals_are_those_of_scipy() -> None:
    from scipy.stats import bootstrap as theirs

    logits, labels = example(300)
    scores = image_scores(logits, labels)
    low, high = bootstrap(scores, labels, 7, resamples=2000)
    value = summarize(scores, labels, 7)
    for name, sample in (("top1", scores.rank == 0), ("nll", scores.nll), ("brier", scores.brier)):
        expected = theirs(
            (sample.astype(float),), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(1)
        )
        width = expected.confidence_interval.high - expected.confidence_interval.low
        # The ends of two bootstraps of 2000 resamples differ by their noise, 4 % of the width at one deviation.
        assert getattr(low, name) == pytest.approx(expected.confidence_interval.low, abs=0.15 * width)
        assert getattr(high, name) == pytest.approx(expected.confidence_interval.high, abs=0.15 * width)
        assert getattr(low, name) < getattr(value, name) < getattr(high, name)
    assert bootstrap(scores, labels, 7, resamples=20) == bootstrap(scores, labels, 7, resamples=20)
    assert bootstrap(scores, labels, 7, resamples=20) != bootstrap(scores, labels, 7, resamples=20, seed=1)
