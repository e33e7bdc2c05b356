"""Rows that each write one answer: greedy or sampled."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_med.inference.model import InferenceModel
from megatron_med.inference.request import Answer, Request, Stopping, longest_of, not_finite
from megatron_med.inference.sampling import NOT_FINITE, History, Sampling, choose
from megatron_med.inference.text import TextStream
from megatron_med.parallel.collectives import Pending

PREFILL_TOKENS = 8192
"""Tokens of the prompts that are read in one pass, unless a single one is longer."""


@dataclass
class _Row:
    request: Request
    answer: Answer
    generator: torch.Generator
    text: TextStream | None

    @property
    def length(self) -> int:
        """Tokens in the cache: the last one of the answer has not been read yet."""
        return len(self.request.prompt) + len(self.answer.tokens) - 1


class RowGroup:
    """Rows that each write one answer. The rows in use are the first ones of the cache."""

    def __init__(
        self, model: InferenceModel, requests: Sequence[Request], sampling: Sampling, stopping: Stopping, rows: int
    ) -> None:
        self._model = model
        self._requests = requests
        self._sampling = sampling
        self._stopping = stopping
        self._cache = model.new_cache(rows, longest_of(requests))
        self._rows: list[_Row] = []
        self._first = 0  # of the rows that the pass under way is about

    def start(self, waiting: deque[int]) -> Pending | None:
        new = self._fill(waiting)
        if new:
            self._first = len(self._rows) - len(new)
            prompts = [row.request.prompt for row in new]
            logits = self._model.prefill(prompts, self._cache, range(self._first, len(self._rows)))
        elif self._rows:
            self._first = 0
            last = [row.answer.tokens[-1] for row in self._rows]
            logits = self._model.decode(last, [row.length for row in self._rows], self._cache)
        else:
            return None
        rows = self._rows[self._first :]
        chosen = None if logits is None else self._choose(logits, rows)
        return self._model.start_broadcast(chosen, (len(rows),), torch.int64)

    def absorb(self, chosen: Tensor) -> Iterator[Answer]:
        for row, token in zip(self._rows[self._first :], chosen.tolist(), strict=True):
            if token == NOT_FINITE:
                raise not_finite()
            self._note(row, token)
            yield row.answer
        for number in reversed(range(self._first, len(self._rows))):
            if self._rows[number].answer.end:
                self._remove(number)

    def _fill(self, waiting: deque[int]) -> list[_Row]:
        """Takes prompts for the free rows."""
        new: list[_Row] = []
        tokens = 0
        while waiting and len(self._rows) < self._cache.rows:
            request = self._requests[waiting[0]]
            tokens += len(request.prompt)
            if new and tokens > PREFILL_TOKENS:
                break
            generator = torch.Generator().manual_seed(request.seed)
            text = self._stopping.stream(request.prompt)
            new.append(_Row(request, Answer(waiting.popleft()), generator, text))
            self._rows.append(new[-1])
        return new

    def _choose(self, logits: Tensor, rows: Sequence[_Row]) -> Tensor:
        if self._sampling.is_plain:
            return self._model.most_likely(logits)
        histories = [History(row.request.prompt, row.answer.tokens) for row in rows]
        generators = [row.generator for row in rows]
        return choose(self._model.whole_logits(logits), self._sampling, histories, generators)

    def _note(self, row: _Row, token: int) -> None:
        answer = row.answer
        if token in self._stopping.end_ids:
            answer.end = "end_token"
        else:
            answer.tokens.append(token)
            if row.text is not None:
                row.text.push(token)
            if row.text is not None and row.text.is_stopped:
                answer.end = "stop_string"
            elif len(answer.tokens) >= row.request.max_new_tokens:
                answer.end = "length"
        if row.text is not None:
            answer.text = row.text.close() if answer.end else row.text.settled()

    def _remove(self, number: int) -> None:
        last = self._rows.pop()
        if number < len(self._rows):
            self._rows[number] = last
            self._cache.move(len(self._rows), number, last.length)
