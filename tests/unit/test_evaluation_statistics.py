"""Intervals, calibration, selective answering and tests, against SciPy, scikit-learn and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics
from sklearn.calibration import calibration_curve

from megatron_med.evaluate import statistics as ours


def _answers(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, and answers that are right a little less often than those say."""
    generator = np.random.default_rng(seed)
    confidence = generator.uniform(0.25, 1, count)
    return confidence, generator.random(count) < confidence**1.5


def test_the_interval_is_scipys_percentile_bootstrap() -> None:
    _, right = _answers(400)
    low, high = ours.interval(right)
    theirs = stats.bootstrap(
        (right.astype(float),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert low == pytest.approx(theirs.low, abs=0.006)
    assert high == pytest.approx(theirs.high, abs=0.006)
    other = ours.interval_of(lambda values: float(np.mean(values)), right)
    assert other == pytest.approx([theirs.low, theirs.high], abs=0.006)


def test_reliability_is_scikit_learns_calibration_curve() -> None:
    confidence, right = _answers(3000)
    bins = ours.reliability(confidence, right)
    accuracy, mean = calibration_curve(right, confidence, n_bins=10)
    np.testing.assert_allclose([one.confidence for one in bins], mean, rtol=1e-12)
    np.testing.assert_allclose([one.accuracy for one in bins], accuracy, rtol=1e-12)
    counts = np.histogram(confidence, np.linspace(0, 1, 11))[0]
    expected = (counts[counts > 0] / counts.sum() * np.abs(accuracy - mean)).sum()
    assert ours.expected_calibration_error(confidence, right) == pytest.approx(expected, rel=1e-12)
    assert [one.count for one in ours.reliability([0.0, 1.0, 1.0], [True, True, False])] == [1, 2]


def test_the_brier_score_is_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(4), 500)
    gold = generator.integers(4, size=500)
    theirs = metrics.brier_score_loss(np.eye(4)[gold], probabilities, scale_by_half=False)
    assert ours.brier_score(probabilities.tolist(), gold.tolist()) == pytest.approx(theirs, rel=1e-12)
    assert ours.brier_score([[1.0, 0.0], [0.2, 0.3, 0.5]], [1, 2]) == pytest.approx((2 + 0.04 + 0.09 + 0.25) / 2)


def test_risk_falls_with_coverage_as_counted_by_hand() -> None:
    curve = ours.risk_coverage([0.9, 0.5, 0.5, 0.2], [True, False, True, False])
    np.testing.assert_allclose(curve.coverage, [0.25, 0.75, 1])
    np.testing.assert_allclose(curve.risk, [0, 1 / 3, 1 / 2])
    assert curve.area == pytest.approx((0 + 2 / 3 + 1 / 2) / 4)
    shuffled = ours.risk_coverage([0.5, 0.2, 0.9, 0.5], [True, False, True, False])
    np.testing.assert_allclose(shuffled.risk, curve.risk)  # equal confidences have no order


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_a_calibrated_threshold_keeps_its_promise(share: float) -> None:
    """Over 2,000 draws of 100 calibration questions and new ones: at most the share is answered wrongly, and little
    less; without the promise's one extra question it would be more."""
    generator = np.random.default_rng(0)
    wrong = []
    for seed in range(2000):
        confidence, right = _answers(100, seed)
        threshold = ours.abstain_threshold(confidence, right, share)
        new = generator.uniform(0.25, 1, 200)
        wrong.append(float(((new >= threshold) & (generator.random(200) >= new**1.5)).mean()))
    assert share - 0.02 < np.mean(wrong) <= share + 3 * np.std(wrong) / 2000**0.5
    assert np.mean(wrong) <= share


def test_nothing_is_answered_where_nothing_can_be_promised() -> None:
    assert ours.abstain_threshold([0.9, 0.8], [True, True], 0.05) == np.inf  # 1 / 3 > 0.05
    assert ours.abstain_threshold([0.9, 0.8, 0.8, 0.1], [True, True, False, False], 0.4) == 0.8
    assert ours.abstain_threshold([0.9, 0.8, 0.8, 0.1], [True, True, False, False], 0.39) == 0.9


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_sets_hold_the_truth_as_often_as_promised(share: float) -> None:
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(1000):
        probabilities = generator.dirichlet(np.ones(4) * 0.5, 260)
        gold = np.array([generator.choice(4, p=row) for row in probabilities])
        of_gold = probabilities[np.arange(260), gold]
        threshold = ours.set_threshold(of_gold[:60], share)
        covered.append(float((of_gold[60:] >= threshold).mean()))
    assert 1 - share <= np.mean(covered) + 3 * np.std(covered) / 1000**0.5
    assert np.mean(covered) < 1 - share + 0.03
    assert ours.set_threshold([0.9, 0.8], 0.1) == 0  # too few to promise anything


@pytest.mark.parametrize(("first", "second"), [(12, 3), (0, 5), (40, 44), (7, 7)])
def test_mcnemar_is_scipys_exact_binomial_test(first: int, second: int) -> None:
    a = np.array([True] * 50 + [True] * first + [False] * second + [False] * 20)
    b = np.array([True] * 50 + [False] * first + [True] * second + [False] * 20)
    found = ours.mcnemar(a, b)
    assert (found.only_first, found.only_second) == (first, second)
    n = first + second
    two_sided = min(1.0, 2 * stats.binom.cdf(min(first, second), n, 0.5))
    assert found.p == pytest.approx(two_sided)
    assert ours.mcnemar(a, a).p == 1


def test_sets_keep_their_promise_on_shares_of_few_votes() -> None:
    """Where 1 - (1 - p) is not p."""
    shares = [0.1, 0.3, 0.5, 0.6, 0.7]
    for votes in shares:
        assert ours.set_threshold([votes] * 99, 0.1) == votes
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(500):
        of_gold = generator.choice(shares, 260, p=[0.05, 0.15, 0.3, 0.3, 0.2])
        covered.append(float((of_gold[60:] >= ours.set_threshold(of_gold[:60], 0.1)).mean()))
    assert np.mean(covered) >= 0.9
