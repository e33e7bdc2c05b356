"""Scores of sequences by the model's own head, many in a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_med.inference.model import InferenceModel
from megatron_med.inference.scoring import TOKENS_AT_ONCE
from megatron_med.parallel.collectives import gather_objects


def head_scores(
    model: InferenceModel, sequences: Sequence[Sequence[int]], progress: Callable[[int], None] = lambda _: None
) -> list[list[float]]:
    """The head's scores at the end of every sequence, on every rank. Data-parallel ranks share the sequences out.

    Args:
        model: on every rank of the grid, with a head that scores.
        sequences: a token at least each.
        progress: is told after every pass how many sequences of this rank's share have been read.

    Returns:
        A number for each label, of each sequence.
    """
    replicas = model.context.batch
    order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number]))
    passes: list[list[int]] = []
    tokens = TOKENS_AT_ONCE
    for number in order[replicas.rank :: replicas.size]:
        if tokens + len(sequences[number]) > TOKENS_AT_ONCE:
            passes.append([])
            tokens = 0
        passes[-1].append(number)
        tokens += len(sequences[number])
    found: dict[int, list[float]] = {}
    for numbers in passes:
        scores = model.scores_at_ends([sequences[number] for number in numbers])
        if scores is not None:
            found |= dict(zip(numbers, scores.tolist(), strict=True))
        progress(len(numbers))
    merged: dict[int, list[float]] = {}
    for part in gather_objects(found, model.context.world):
        merged |= part
    return [merged[number] for number in range(len(sequences))]
