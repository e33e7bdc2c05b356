"""Which samples a data-parallel rank reads at a step: a function of the samples consumed, nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatchPlace:
    """Where a micro-batch stands.

    Attributes:
        index: number within the global batch, over all data-parallel ranks.
        samples: global sample numbers.
    """

    index: int
    samples: range


def micro_batch_places(
    consumed: int, batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[MicroBatchPlace]:
    """The micro-batches of one rank in the global batch that begins at sample ``consumed``.

    Micro-batches are dealt to the ranks in turn; a last short one keeps its place, and ranks beyond it get an
    empty range, so that every rank has equally many.
    """
    total = -(-batch_size // micro_batch_size)
    rounds = -(-total // dp_size)
    places = []
    for turn in range(rounds):
        index = turn * dp_size + dp_rank
        start = min(index * micro_batch_size, batch_size)
        stop = min(start + micro_batch_size, batch_size)
        places.append(MicroBatchPlace(index, range(consumed + start, consumed + stop)))
    return places
