"""Examples in front of a question: one draw from the training file for all questions, by a seed. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_med.errors import DataError
from megatron_med.evaluate.questions import Question


def draw(training: Sequence[Question], shots: int, seed: int) -> list[Question]:
    """The questions that ``datasets.Dataset.shuffle(seed).select(range(shots))`` takes, which Meditron uses."""
    order = np.random.default_rng(seed).permutation(len(training))
    return [training[place] for place in order[:shots].tolist()]


def check_apart(training: Sequence[Question], tested: Sequence[Question], source: Path, shots: int) -> None:
    """Refuses examples that are asked, too.

    Raises:
        DataError: a question stands in both, or there are fewer than ``shots`` to draw from.
    """
    if len(training) < shots:
        raise DataError(f"{source} holds {len(training)} questions to draw examples from, and --shots is {shots}.")
    asked = {(question.question, question.context) for question in tested}
    both = [question for question in training if (question.question, question.context) in asked]
    if both:
        raise DataError(
            f"{source}: {len(both)} of its questions are asked, too ({both[0].id} is one): examples come from the "
            "training split. Give another file, or --shots 0."
        )
