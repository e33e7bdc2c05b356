"""What no harness gives: calibration, selective answering, results by subject, length and order of the options, the
clean part. Numbers only; ``report.py`` shows them. No torch here."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from megatron_med.evaluate import statistics
from megatron_med.evaluate.judged import Judged, judge, metrics_of
from megatron_med.evaluate.results import ORDER, Sample

WRONG_SHARE = 0.1
"""Of all questions, that a model that may abstain answers wrongly at most."""
MISS_SHARE = 0.1
"""Of all questions, that a set of options may miss the right one in."""
_FEWEST = 20
"""Answers in each half, below which no promise is made."""
_LENGTHS = 4


def analyse(samples: Sequence[Sample], contaminated: Collection[str] | None = None) -> dict[str, Any]:
    """Metric -> what can be said of its answers.

    Args:
        samples: of one task.
        contaminated: ids of questions that training files hold; None: nobody has looked.
    """
    metrics = metrics_of(samples)
    found = {}
    for metric in metrics:
        if ORDER in metric:
            continue
        answers = judge(samples, metric)
        once = _first_draw(answers)
        told: dict[str, Any] = {"lengths": by_length(once)}
        if any(one.subject for one in answers):
            told["subjects"] = by_subject(answers)
        sure = [one for one in once if one.probabilities is not None]
        if sure:
            told |= {"calibration": calibration(sure), "selective": selective(sure), "without": len(once) - len(sure)}
        orders = {name: _first_draw(judge(samples, name)) for name in metrics if name.startswith(f"{metric}{ORDER}")}
        if orders:
            told["order"] = by_order(once, orders)
        if contaminated is not None:
            told["clean"] = _share([one for one in answers if one.id not in contaminated])
        found[metric] = told
    return found


def _first_draw(answers: Sequence[Judged]) -> list[Judged]:
    """One answer a question: where examples were drawn several times, those behind the first draw."""
    return [one for one in answers if one.seed == answers[0].seed]


def _share(answers: Sequence[Judged]) -> dict[str, Any]:
    """Accuracy with its interval. The seeds of a question are drawn together."""
    by_question: dict[str, list[bool]] = defaultdict(list)
    for one in answers:
        by_question[one.id].append(one.right)
    values = [float(np.mean(found)) for found in by_question.values()]
    if not values:
        return {"value": None, "interval": None, "count": 0}
    return {"value": float(np.mean(values)), "interval": statistics.interval(values), "count": len(values)}


def by_subject(answers: Sequence[Judged]) -> dict[str, Any]:
    """Accuracy of each subject, the one with most questions first."""
    subjects: dict[str, list[Judged]] = defaultdict(list)
    for one in answers:
        subjects[one.subject or "none"].append(one)
    shares = {subject: _share(some) for subject, some in subjects.items()}
    return dict(sorted(shares.items(), key=lambda item: (-item[1]["count"], item[0])))


def by_length(answers: Sequence[Judged]) -> list[dict[str, Any]]:
    """Accuracy of questions in four parts, by their words; questions of one length stay together."""
    words = np.array([one.words for one in answers])
    borders = np.unique(np.quantile(words, np.arange(1, _LENGTHS) / _LENGTHS, method="lower"))
    places = np.searchsorted(borders, words)
    parts = [[one for one, of in zip(answers, places, strict=True) if of == part] for part in range(len(borders) + 1)]
    return [
        {"words": [min(one.words for one in part), max(one.words for one in part)], **_share(part)}
        for part in parts
        if part
    ]


def calibration(answers: Sequence[Judged]) -> dict[str, Any]:
    """Whether answers are right as often as their probability says."""
    confidence = np.array([one.confidence for one in answers])
    right = np.array([one.right for one in answers])
    bins = statistics.reliability(confidence, right)
    squares = [_squared_distance(one) for one in answers]
    return {
        "ece": statistics.expected_calibration_error(confidence, right),
        "ece_interval": statistics.interval_of(statistics.expected_calibration_error, confidence, right),
        "brier": float(np.mean(squares)),
        "brier_interval": statistics.interval(squares),
        "bins": [[one.confidence, one.accuracy, one.count] for one in bins],
    }


def _squared_distance(one: Judged) -> float:
    assert one.probabilities is not None, "asked for ways with probabilities only"
    letters = sorted({*one.probabilities, one.gold})
    return statistics.brier_score(
        [[one.probabilities.get(letter, 0.0) for letter in letters]], [letters.index(one.gold)]
    )


def selective(answers: Sequence[Judged]) -> dict[str, Any]:
    """Answering only where the model is sure: the whole curve, and what can be promised.

    One half of the questions, by a hash of their ids, sets the thresholds; the other half shows what they give.
    """
    curve = statistics.risk_coverage([one.confidence for one in answers], [one.right for one in answers])
    places = np.unique(np.linspace(0, len(curve.risk) - 1, 200).astype(int))
    told: dict[str, Any] = {
        "area": curve.area,
        "curve": [[float(curve.coverage[place]), float(curve.risk[place])] for place in places],
    }
    setting = [one for one in answers if _sets_thresholds(one.id)]
    test = [one for one in answers if not _sets_thresholds(one.id)]
    if min(len(setting), len(test)) >= _FEWEST:
        told |= {"abstain": _abstaining(setting, test), "sets": _sets(setting, test)}
    return told


def _sets_thresholds(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0


def _abstaining(setting: Sequence[Judged], test: Sequence[Judged]) -> dict[str, Any]:
    threshold = statistics.abstain_threshold(
        [one.confidence for one in setting], [one.right for one in setting], WRONG_SHARE
    )
    answered = [one for one in test if one.confidence >= threshold]
    return {
        "wrong_share_at_most": WRONG_SHARE,
        "threshold": threshold if np.isfinite(threshold) else None,
        "answered": len(answered) / len(test),
        "wrong": sum(not one.right for one in answered) / len(test),
        "accuracy_of_answered": sum(one.right for one in answered) / len(answered) if answered else None,
        "calibration": len(setting),
        "test": len(test),
    }


def _sets(setting: Sequence[Judged], test: Sequence[Judged]) -> dict[str, Any]:
    threshold = statistics.set_threshold([_of_gold(one) for one in setting], MISS_SHARE)
    sizes = [sum(p >= threshold for p in (one.probabilities or {}).values()) for one in test]
    return {
        "miss_share_at_most": MISS_SHARE,
        "threshold": threshold,
        "covered": sum(_of_gold(one) >= threshold for one in test) / len(test),
        "mean_size": float(np.mean(sizes)),
        "single": sum(size == 1 for size in sizes) / len(test),
    }


def _of_gold(one: Judged) -> float:
    return (one.probabilities or {}).get(one.gold, 0.0)


def by_order(answers: Sequence[Judged], orders: dict[str, list[Judged]]) -> dict[str, Any]:
    """What happens where the same options stand in another order."""
    chosen: dict[str, set[str | None]] = {one.id: {one.prediction} for one in answers}
    for moved in orders.values():
        for one in moved:
            chosen.setdefault(one.id, set()).add(one.prediction)
    values = [_share(answers)["value"], *(_share(moved)["value"] for moved in orders.values())]
    return {
        "orders": len(values),
        "values": values,
        "lowest": min(values),
        "highest": max(values),
        "same_answer": sum(len(letters) == 1 and None not in letters for letters in chosen.values()) / len(chosen),
    }
