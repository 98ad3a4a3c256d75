"""Measures of sets of labels: scikit-learn's numbers, also where scores are equal; thresholds; intervals."""

import numpy as np
import pytest

from nfzoo.analysis import multi_label
from tests.support.label_sets import SK
from tests.support.loops import each

EXACT = 1e-12


def example(n: int = 60, classes: int = 4, seed: int = 0, levels: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return logits, of which many are equal with `levels`, and targets that follow them in part."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)).astype(np.float32)
    targets = logits + rng.normal(size=(n, classes)) > 0.5
    return (np.round(logits * levels) / levels if levels else logits).astype(np.float32), targets


@each(("seed", "levels"), [(0, 0), (1, 1), (2, 2), (3, 1)])
def test_average_precision_is_scikit_learns(seed: int, levels: int) -> None:
    logits, targets = example(seed=seed, levels=levels)
    found = multi_label.average_precisions(logits, targets)
    expected = SK.average_precision_score(targets, logits, average=None)
    np.testing.assert_allclose(found, expected, atol=EXACT)
    assert multi_label.mean_over_known(found) == pytest.approx(SK.average_precision_score(targets, logits), abs=EXACT)


def test_a_class_without_images_counts_in_no_mean() -> None:
    logits, targets = example()
    targets[:, 2] = False
    found = multi_label.average_precisions(logits, targets)
    assert np.isnan(found).tolist() == [False, False, True, False]
    known = [0, 1, 3]
    expected = SK.average_precision_score(targets[:, known], logits[:, known])
    assert multi_label.mean_over_known(found) == pytest.approx(expected, abs=EXACT)
    assert np.isnan(multi_label.mean_over_known(np.array([np.nan])))
    assert np.isnan(multi_label.average_precision(np.zeros(0), np.zeros(0, bool)))


def test_scores_at_thresholds_are_scikit_learns() -> None:
    logits, targets = example(n=80)
    thresholds = np.array([0.3, 0.5, 0.7, 0.62])
    found = multi_label.label_scores(logits, targets, thresholds)
    predictions = 1 / (1 + np.exp(-logits.astype(np.float64))) >= thresholds
    expected = SK.precision_recall_fscore_support(targets, predictions)
    for ours, theirs in zip(found, expected, strict=False):
        np.testing.assert_allclose(ours, theirs, atol=EXACT)
    assert found.macro_f1() == pytest.approx(SK.f1_score(targets, predictions, average="macro"), abs=EXACT)
    assert found.micro_f1() == pytest.approx(SK.f1_score(targets, predictions, average="micro"), abs=EXACT)
    losses = multi_label.image_losses(logits, targets)
    pairs = multi_label.sigmoid(logits).ravel()
    assert multi_label.mean_loss(losses) == pytest.approx(SK.log_loss(targets.ravel(), pairs), abs=1e-9)
    order = np.random.default_rng(0).permutation(80)
    assert multi_label.mean_loss(losses[order]) == multi_label.mean_loss(losses)  # to the bit


def test_no_labels_at_all_are_no_score() -> None:
    found = multi_label.label_scores(np.full((3, 2), -9.0), np.zeros((3, 2), bool), np.full(2, 0.5))
    assert np.isnan(found.macro_f1())
    assert np.isnan(found.micro_f1())
    assert found.f1.tolist() == [0, 0]


@each(("seed", "levels"), [(0, 0), (1, 1), (2, 3)])
def test_no_other_threshold_has_a_better_f1(seed: int, levels: int) -> None:
    logits, targets = example(n=40, seed=seed, levels=levels)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    for c, threshold in enumerate(multi_label.fit_thresholds(logits, targets)):
        assert 0 < threshold < 1
        own = SK.f1_score(targets[:, c], probabilities[:, c] >= threshold)
        tried = [0.0, *np.unique(probabilities[:, c])]
        assert own == pytest.approx(max(SK.f1_score(targets[:, c], probabilities[:, c] >= t) for t in tried), abs=EXACT)
        assert not (probabilities[:, c] == threshold).any()  # between two, so that rounding does not matter


def test_thresholds_have_the_best_f1_that_float32_probabilities_can_have() -> None:
    """Sigmoids above 17 are 1 in float32, and those of near logits are equal: what predictions compare are these."""
    cases = {
        "large": ([25.0, 30.0, 22.0, 20.0, 3.0, -2.0], [0, 1, 0, 0, 1, 0]),
        "equal": ([24.0, 19.0, 40.0], [1, 0, 0]),
        "near": ([0.24000001, 0.23999999, 0.2399999, -1.0], [1, 1, 0, 0]),
        "low": ([-100.0, -104.0, -120.0, 40.0], [1, 0, 0, 1]),
    }
    for case, (values, known) in cases.items():
        logits, targets = np.array(values, np.float32)[:, None], np.array(known, bool)[:, None]
        probabilities = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)[:, 0]
        threshold = np.float32(multi_label.fit_thresholds(logits, targets)[0])
        best = max(SK.f1_score(targets[:, 0], probabilities >= p) for p in probabilities)
        assert SK.f1_score(targets[:, 0], probabilities >= threshold) == pytest.approx(best, abs=1e-12), case


def test_thresholds_of_odd_classes() -> None:
    logits = np.array([[-2.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    assert multi_label.fit_thresholds(logits, np.zeros((3, 2), bool)) == (0.5, 0.5)
    everywhere, _ = multi_label.fit_thresholds(logits, np.ones((3, 2), bool))
    assert 0 < everywhere < multi_label.sigmoid(np.array(-2.0))
    extreme = multi_label.sigmoid(np.array([-1000.0, 1000.0], np.float32))
    assert extreme.tolist() == [0.0, 1.0]


def test_the_intervals_are_quantiles_of_resamples() -> None:
    logits, targets = example(n=30, levels=2)
    thresholds = np.array([0.3, 0.5, 0.7, 0.62])
    rng = np.random.default_rng(5)
    drawn = [rng.integers(30, size=30) for _ in range(20)]
    predictions = 1 / (1 + np.exp(-logits.astype(np.float64))) >= thresholds
    table = [
        (
            SK.average_precision_score(targets[rows], logits[rows]),
            SK.f1_score(targets[rows], predictions[rows], average="macro"),
            SK.f1_score(targets[rows], predictions[rows], average="micro"),
            SK.log_loss(targets[rows].ravel(), multi_label.sigmoid(logits[rows]).ravel()),
        )
        for rows in drawn
    ]
    found = multi_label.bootstrap_sets(logits, targets, thresholds, resamples=20, level=0.8, seed=5)
    np.testing.assert_allclose(found, np.quantile(table, [0.1, 0.9], axis=0), atol=1e-9)
