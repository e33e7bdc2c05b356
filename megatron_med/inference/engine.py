"""Writes answers to many prompts at once.

Rows of the cache are cut into as many groups as there are pipeline stages, whose passes follow each other: while one
group's tokens are chosen on the last stage, the others are on their way. A row whose answer has ended takes the next
prompt. Every rank schedules the same; only the choices travel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from megatron_med.config.schema import LANGUAGE_MODEL
from megatron_med.inference.beam import BeamGroup
from megatron_med.inference.model import InferenceModel
from megatron_med.inference.request import NEVER, Answer, Group, Request, Stopping, no_language_model
from megatron_med.inference.rows import RowGroup
from megatron_med.inference.sampling import GREEDY, Sampling
from megatron_med.parallel.collectives import Pending


class Engine:
    """Answers requests.

    Args:
        model: on every rank of the grid.
        sampling: how tokens are chosen.
        stopping: what ends an answer.
        slots: rows that are written at the same time, beams included.

    Raises:
        ConfigError: the model scores texts and writes none.
    """

    def __init__(
        self, model: InferenceModel, sampling: Sampling = GREEDY, stopping: Stopping = NEVER, slots: int = 16
    ) -> None:
        if model.config.head != LANGUAGE_MODEL:
            raise no_language_model(model.config.head)
        self._model = model
        self._sampling = sampling
        self._stopping = stopping
        self._slots = slots

    def stream(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Answers as they grow: each is given again, changed, for every new token, the last time with its ``end``.

        Raises:
            CheckpointError: the model's logits are not finite.
        """
        if not requests:
            return
        make = BeamGroup if self._sampling.beams > 1 else RowGroup
        count = min(self._model.context.pp.size, len(requests))
        at_once = min(max(1, self._slots // self._sampling.beams // count), -(-len(requests) // count))
        groups: list[Group] = [
            make(self._model, requests, self._sampling, self._stopping, at_once) for _ in range(count)
        ]
        yield from drive(groups, deque(range(len(requests))))

    def answers(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Whole answers, in the order in which they end."""
        return (answer for answer in self.stream(requests) if answer.end)


def drive(groups: Sequence[Group], waiting: deque[int]) -> Iterator[Answer]:
    """Lets groups take turns until no prompt is left. A group's choice is waited for when its turn comes again."""
    pending: list[Pending | None] = [None] * len(groups)
    while True:
        for number, group in enumerate(groups):
            under_way = pending[number]
            if under_way is not None:
                yield from group.absorb(under_way.wait())
            pending[number] = group.start(waiting)
        if not any(pending):
            return
