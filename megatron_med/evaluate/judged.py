"""Samples of a results folder as answers that were judged: right or wrong, how sure, on what kind of question. No torch
here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_med.evaluate.results import Sample


@dataclass(frozen=True)
class Judged:
    """One answer.

    Attributes:
        id: of the question.
        seed: of the shots.
        prediction: letter; None where none could be read.
        gold: letter of the right one.
        probabilities: of the options by letter, where the way of scoring gives any; an option that is not in it has 0.
        subject: of the question; empty where the file names none.
        words: of the prompt, but for what all prompts begin with.
    """

    id: str
    seed: int
    prediction: str | None
    gold: str
    probabilities: Mapping[str, float] | None
    subject: str
    words: int

    @property
    def right(self) -> bool:
        return self.prediction == self.gold

    @property
    def confidence(self) -> float:
        """Probability of the answer that was given."""
        assert self.probabilities is not None, "only ways with probabilities have a confidence"
        return self.probabilities.get(self.prediction or "", 0.0)


def judge(samples: Iterable[Sample], metric: str) -> list[Judged]:
    """All answers of one metric, in the order of the samples."""
    mine = [sample for sample in samples if metric in sample.get("predictions", {})]
    prompts: dict[int, list[str]] = {}
    for sample in mine:
        prompts.setdefault(sample.get("seed", 0), []).append(sample["prompt"])
    shared = {seed: _shared_beginning(of_seed) for seed, of_seed in prompts.items()}
    return [
        Judged(
            sample["id"],
            sample.get("seed", 0),
            sample["predictions"][metric],
            sample["gold"],
            _probabilities(sample, metric),
            sample.get("subject", ""),
            len(sample["prompt"][shared[sample.get("seed", 0)] :].split()),
        )
        for sample in mine
    ]


def metrics_of(samples: Iterable[Sample]) -> list[str]:
    """Names of the metrics that samples have, in their order."""
    return list(dict.fromkeys(metric for sample in samples for metric in sample.get("predictions", {})))


def _shared_beginning(prompts: Sequence[str]) -> int:
    """Characters of instructions and examples that stand in front of every question."""
    first, last = min(prompts, default=""), max(prompts, default="")  # what they share, all between them share
    if first == last:
        return 0
    return next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))


def _probabilities(sample: Sample, metric: str) -> dict[str, float] | None:
    """Softmax of the options' log-likelihoods, or shares of the votes; None where a way gives neither, or divides them
    by a length."""
    values = sample.get("loglikelihoods")
    if values and "per_" not in metric:
        highest = max(values)
        weights = [math.exp(value - highest) for value in values]
        return {chr(ord("A") + place): weight / sum(weights) for place, weight in enumerate(weights)}
    if sample.get("answers"):
        votes = Counter(answer for answer in sample["answers"] if answer is not None)
        return {letter: count / len(sample["answers"]) for letter, count in votes.items()}
    return None
