"""What a row of right and wrong answers says: intervals, calibration, selective answering, tests. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

RESAMPLES = 1000
LEVEL = 0.95


def percentiles(values: Any) -> list[float]:
    """The middle 95 % of resampled values."""
    tail = 100 * (1 - LEVEL) / 2
    return [float(value) for value in np.percentile(values, [tail, 100 - tail])]


def interval(values: Any) -> list[float]:
    """95 % bootstrap interval of the mean of some values (percentiles of 1,000 resamples with a fixed seed)."""
    values = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return percentiles(values[drawn].mean(axis=1))


def interval_of(statistic: Callable[..., float], *columns: Any) -> list[float]:
    """95 % bootstrap interval of any statistic of columns that are resampled together."""
    arrays = [np.asarray(column) for column in columns]
    generator = np.random.default_rng(0)
    draws = (generator.integers(len(arrays[0]), size=len(arrays[0])) for _ in range(RESAMPLES))
    return percentiles([statistic(*(array[drawn] for array in arrays)) for drawn in draws])


@dataclass(frozen=True)
class Bin:
    """Answers of about the same confidence.

    Attributes:
        confidence, accuracy: their means.
        count: of answers.
    """

    confidence: float
    accuracy: float
    count: int


def reliability(confidence: Any, right: Any, bins: int = 10) -> list[Bin]:
    """Answers by confidence, in ``bins`` parts of [0, 1] of equal width, those that hold any."""
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    places = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    members = [places == place for place in range(bins)]
    return [Bin(float(confidence[m].mean()), float(right[m].mean()), int(m.sum())) for m in members if m.any()]


def expected_calibration_error(confidence: Any, right: Any, bins: int = 10) -> float:
    """Mean distance of confidence and accuracy over bins, weighted by their answers (Naeini et al. 2015)."""
    found = reliability(confidence, right, bins)
    total = sum(one.count for one in found)
    return sum(one.count * abs(one.confidence - one.accuracy) for one in found) / total


def brier_score(probabilities: Sequence[Sequence[float]], gold: Sequence[int]) -> float:
    """Mean squared distance of the probabilities from the truth, summed over the options (Brier 1950): 0 to 2.

    Args:
        probabilities: of the options of each question, as many as it has.
        gold: place of the right one.
    """
    total = 0.0
    for row, right in zip(probabilities, gold, strict=True):
        total += sum((p - (place == right)) ** 2 for place, p in enumerate(row))
    return total / len(gold)


@dataclass(frozen=True)
class RiskCoverage:
    """Answering only what the model is surest of.

    Attributes:
        coverage: shares of the questions that are answered, ascending.
        risk: share of wrong answers among those.
        area: under the curve (Geifman et al. 2019); 0 is best.
    """

    coverage: Floats
    risk: Floats
    area: float


def risk_coverage(confidence: Any, right: Any) -> RiskCoverage:
    """The curve over all thresholds. Answers of one confidence are given together."""
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, bool)
    order = np.argsort(-confidence, kind="stable")
    falling = confidence[order]
    answered = np.arange(1, len(order) + 1)
    risk = np.cumsum(~right[order]) / answered
    last = np.append(falling[1:] != falling[:-1], True)  # of each run of equal confidences
    runs = np.diff(np.append(0, answered[last]))
    area = float((risk[last] * runs).sum() / len(order))
    return RiskCoverage(answered[last] / len(order), risk[last], area)


def abstain_threshold(confidence: Any, right: Any, wrong_share: float) -> float:
    """The lowest confidence at which a model answers, so that it answers at most a share of all questions wrongly.

    Conformal risk control (Angelopoulos et al. 2024, theorem 1) of the loss "answered, and wrong": over draws of the
    calibration questions and of a new one, its expectation is at most ``wrong_share``.

    Args:
        confidence, right: of the calibration questions.
        wrong_share: of all questions, answered or not.

    Returns:
        Answer where the confidence is at least this; infinite: never.
    """
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, bool)
    count = len(confidence)
    order = np.argsort(-confidence, kind="stable")
    wrong = np.cumsum(~right[order])
    falling = confidence[order]
    last = np.append(falling[1:] != falling[:-1], True)
    allowed = last & (wrong + 1 <= wrong_share * (count + 1))
    return float(falling[allowed][-1]) if allowed.any() else math.inf


def set_threshold(probability_of_gold: Any, miss_share: float) -> float:
    """The least probability at which an option joins a question's set, so that the set misses the truth for at most a
    share of the questions (split conformal prediction, Vovk et al. 2005; score 1 - p of Sadinle et al. 2019).

    Args:
        probability_of_gold: of the right option of each calibration question.
        miss_share: of the questions.

    Returns:
        Options of at least this probability are the set; 0: all of them.
    """
    falling = -np.sort(-np.asarray(probability_of_gold, np.float64))  # no 1 - (1 - p): that is not p
    place = math.ceil((len(falling) + 1) * (1 - miss_share))
    return 0.0 if place > len(falling) else float(falling[place - 1])


@dataclass(frozen=True)
class McNemar:
    """Two models on the same questions.

    Attributes:
        only_first, only_second: questions that one alone has right.
        p: of a difference at least so uneven by chance; exact, two-sided (McNemar 1947).
    """

    only_first: int
    only_second: int
    p: float


def mcnemar(first: Any, second: Any) -> McNemar:
    """The exact test on paired right and wrong answers."""
    from scipy.stats import binomtest  # half a second at every start

    first, second = np.asarray(first, bool), np.asarray(second, bool)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    uneven = only_first + only_second
    return McNemar(only_first, only_second, float(binomtest(only_first, uneven).pvalue) if uneven else 1.0)
