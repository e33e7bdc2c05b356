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


def apart_from(training: Sequence[Question], tested: Sequence[Question], source: Path, shots: int) -> list[Question]:
    """Training questions that are not asked; MMLU's development split has some that are.

    Raises:
        DataError: most of them are asked, since it is the test split, or fewer than ``shots`` are left.
    """
    asked = {(question.question, question.context) for question in tested}
    left = [question for question in training if (question.question, question.context) not in asked]
    if 2 * len(left) < len(training):
        raise DataError(
            f"{source}: {len(training) - len(left)} of its {len(training)} questions are asked, too: it is the test "
            "split. Examples come from the training split: give another file, or --shots 0."
        )
    if len(left) < shots:
        raise DataError(f"{source} holds {len(left)} questions to draw examples from, and --shots is {shots}.")
    return left
