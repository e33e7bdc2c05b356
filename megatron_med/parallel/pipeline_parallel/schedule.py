"""Pipeline schedules as plain data: for every stage, the list of passes it runs in order.

Generators make such lists, ``simulation.py`` proves that a list can run and predicts its time, ``engine.py`` executes
it. No torch here. ``megatron-med draw-schedule 1f1b --picture out.png`` draws any of them.

With several chunks a stage, chunk c of stage s holds the layers of virtual stage ``c * stages + s``: a micro-batch
goes through all stages once for every chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Forward:
    """The forward pass of one micro-batch through one chunk of the stage's layers."""

    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class Backward:
    """The backward pass of one micro-batch through one chunk of the stage's layers."""

    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class BackwardInput:
    """The part of a backward pass that the stage before waits for: the gradient of the chunk's input."""

    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class BackwardWeight:
    """The part of a backward pass that nobody waits for: the gradients of the chunk's matrices."""

    micro_batch: int
    chunk: int = 0


Action = Forward | Backward | BackwardInput | BackwardWeight
Schedule = list[list[Action]]
"""Stage -> actions in order."""


def gpipe(stages: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """All forward passes, then all backward passes (Huang et al. 2019)."""
    forwards: list[Action] = [Forward(index, chunk) for chunk in range(chunks) for index in range(micro_batches)]
    backwards: list[Action] = [
        Backward(index, chunk) for chunk in reversed(range(chunks)) for index in range(micro_batches)
    ]
    return [forwards + backwards for _ in range(stages)]


def one_forward_one_backward(stages: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """1F1B (Narayanan et al. 2021): warm-up forwards, then pairs, then cool-down backwards.

    Stage s keeps at most ``stages - s`` micro-batches alive.
    """
    assert chunks == 1, "1f1b runs one chunk a stage; interleaved runs several"
    order = list(range(micro_batches))
    forwards: list[Action] = [Forward(index) for index in order]
    backwards: list[Action] = [Backward(index) for index in order]
    return [_pairs(forwards, backwards, stages - stage - 1) for stage in range(stages)]


def interleaved(stages: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """Interleaved 1F1B (Narayanan et al. 2021): every stage holds several chunks of layers.

    Micro-batches go in groups of ``stages`` (or a little more, where ``stages`` does not divide their number); a
    group runs through the stage's first chunk, then its second, and so on. The bubble shrinks by the number of
    chunks, and the number of transfers grows by it.
    """
    forward_order = _by_groups(stages, micro_batches, list(range(chunks)))
    backward_order = _by_groups(stages, micro_batches, list(reversed(range(chunks))))
    forwards: list[Action] = [Forward(*place) for place in forward_order]
    backwards: list[Action] = [Backward(*place) for place in backward_order]
    schedule: Schedule = []
    for stage in range(stages):
        # The first backward of a stage's last chunk comes back after this many forwards.
        warmup = 2 * (stages - stage - 1) + (chunks - 1) * max(map(len, _groups(stages, micro_batches)))
        schedule.append(_pairs(forwards, backwards, warmup))
    return schedule


def zero_bubble(stages: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """ZB-H1 (Qi et al. 2023): 1F1B whose backward passes are split, the weight part put off to fill the bubble.

    Stage s runs its weight parts s micro-batches late. It then keeps at most ``stages`` micro-batches alive, as
    the first stage of 1F1B does, while the gradients of inputs travel back without waiting for weight products.
    """
    assert chunks == 1, "zero_bubble runs one chunk a stage"
    schedule: Schedule = []
    for stage in range(stages):
        warmup = min(stages - stage - 1, micro_batches)
        actions: list[Action] = [Forward(index) for index in range(warmup)]
        for index in range(micro_batches):
            if warmup + index < micro_batches:
                actions.append(Forward(warmup + index))
            actions.append(BackwardInput(index))
            if index >= stage:
                actions.append(BackwardWeight(index - stage))
        actions += [BackwardWeight(index) for index in range(max(0, micro_batches - stage), micro_batches)]
        schedule.append(actions)
    return schedule


def forward_only(stages: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """Validation: no backward pass."""
    order = _by_groups(stages, micro_batches, list(range(chunks)))
    return [[Forward(*place) for place in order] for _ in range(stages)]


GENERATORS: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zero_bubble": zero_bubble,
}
"""Schedules by the name that ``parallel.schedule`` takes: (stages, micro_batches, chunks) -> schedule."""


def _pairs(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """``warmup`` forwards, then a forward and a backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    actions = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        actions += [forward, backward]
    return actions + backwards[len(forwards) - warmup :]


def _groups(stages: int, micro_batches: int) -> list[range]:
    """Micro-batches in groups of at least ``stages``, as even as can be: a shorter one would make stages wait for
    each other for ever."""
    count = max(1, micro_batches // stages)
    borders = [micro_batches * group // count for group in range(count + 1)]
    return [range(first, end) for first, end in itertools.pairwise(borders)]


def _by_groups(stages: int, micro_batches: int, chunks: list[int]) -> list[tuple[int, int]]:
    """(micro-batch, chunk): each group of micro-batches goes through every chunk in turn."""
    return [(index, chunk) for group in _groups(stages, micro_batches) for chunk in chunks for index in group]
