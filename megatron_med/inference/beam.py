"""Beam search, as ``transformers`` has it with ``early_stopping=False``."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_med.inference.model import InferenceModel
from megatron_med.inference.request import Answer, Request, Stopping, longest_of, not_finite
from megatron_med.inference.sampling import History, Sampling, penalise
from megatron_med.parallel.collectives import Pending


class _Beam(NamedTuple):
    """A hypothesis: sum of its tokens' log-probabilities, and the tokens."""

    score: float
    tokens: list[int]


@dataclass
class _Search:
    """The search for one prompt's answer.

    Attributes:
        number: of the prompt.
        running: hypotheses that go on, best first.
        sources: the row of its own that each of them goes on from.
        finished: the best ones that have ended, with their scores over their lengths, and why they ended.
    """

    number: int
    request: Request
    running: list[_Beam]
    sources: list[int] = field(default_factory=list)
    finished: list[tuple[float, list[int], str]] = field(default_factory=list)
    is_over: bool = False


class BeamGroup:
    """Prompts that are searched at the same time; each has as many rows of the cache as there are beams.

    Args:
        model: on every rank of the grid.
        requests: all of them.
        sampling: number of beams, penalties.
        stopping: end tokens; texts are not looked at.
        prompts: that are searched at the same time.
    """

    def __init__(
        self, model: InferenceModel, requests: Sequence[Request], sampling: Sampling, stopping: Stopping, prompts: int
    ) -> None:
        self._model = model
        self._requests = requests
        self._sampling = sampling
        self._stopping = stopping
        self._beams = sampling.beams
        self._kept = max(2, 1 + len(stopping.end_ids)) * self._beams  # enough to go on where all best ones end
        self._at_once = prompts
        self._cache = model.new_cache(prompts * self._beams, longest_of(requests))
        self._searches: list[_Search] = []
        self._new = 0  # searches at the end of the list whose prompts are being read

    def start(self, waiting: deque[int]) -> Pending | None:
        self._new = 0
        while waiting and len(self._searches) < self._at_once:
            number = waiting.popleft()
            self._searches.append(_Search(number, self._requests[number], [_Beam(0.0, [])]))
            self._new += 1
        if not self._searches:
            return None
        if self._new:
            searches = self._searches[-self._new :]
            first = len(self._searches) - self._new
            rows = [number * self._beams for number in range(first, len(self._searches))]
            logits = self._model.prefill([search.request.prompt for search in searches], self._cache, rows)
        else:
            searches = self._searches
            beams = [(search, beam) for search in searches for beam in search.running]
            lengths = [len(search.request.prompt) + len(beam.tokens) - 1 for search, beam in beams]
            logits = self._model.decode([beam.tokens[-1] for _, beam in beams], lengths, self._cache)
        best = None if logits is None else self._best(self._model.whole_logits(logits), searches)
        return self._model.start_broadcast(best, (len(searches), self._kept, 3), torch.float64)

    def absorb(self, chosen: Tensor) -> Iterator[Answer]:
        under_way = self._searches[-self._new :] if self._new else self._searches
        for search, candidates in zip(under_way, chosen.tolist(), strict=True):
            self._step(search, candidates)
        self._reorder(under_way)
        for place in reversed(range(len(self._searches))):
            if self._searches[place].is_over:
                yield self._answer(self._searches[place])
                self._remove(place)

    def _best(self, logits: Tensor, searches: Sequence[_Search]) -> Tensor:
        """The best continuations of each search, ``[searches, kept, 3]``: score, hypothesis, token."""
        scores = logits.log_softmax(dim=-1)
        broken = ~logits.isfinite().all(dim=-1)
        if self._sampling.reads_history:
            histories = [History(search.request.prompt, beam.tokens) for search in searches for beam in search.running]
            penalise(scores, self._sampling, histories)
        scores = scores.masked_fill(broken.unsqueeze(-1), math.nan)
        earlier = torch.tensor([beam.score for search in searches for beam in search.running], device=scores.device)
        scores = (scores + earlier.unsqueeze(-1)).view(len(searches), -1)
        values, places = scores.topk(min(self._kept, scores.shape[-1]), dim=-1)
        vocabulary = logits.shape[-1]
        best = torch.stack((values.double(), (places // vocabulary).double(), (places % vocabulary).double()), dim=-1)
        missing = best.new_full((len(best), self._kept - best.shape[1], 3), -math.inf)
        return torch.cat((best, missing), dim=1)

    def _step(self, search: _Search, candidates: list[list[float]]) -> None:
        """One more token for every hypothesis.

        Only the ``beams`` best candidates may end; the others stand by, so that there are enough to go on with.
        """
        found = [(score, int(beam), int(token)) for score, beam, token in candidates if score != -math.inf]
        if any(math.isnan(score) for score, _, _ in found):
            raise not_finite()
        length = len(search.running[0].tokens) + 1
        divisor = length**self._sampling.length_penalty
        going_on: list[tuple[_Beam, int]] = []
        for rank, (score, beam, token) in enumerate(found):
            tokens = [*search.running[beam].tokens, token]
            end = "end_token" if token in self._stopping.end_ids else ""
            if not end and length >= search.request.max_new_tokens:
                end = "length"
            if not end:
                going_on.append((_Beam(score, tokens), beam))
            elif rank < self._beams:
                search.finished.append((score / divisor, tokens[:-1] if end == "end_token" else tokens, end))
        search.finished.sort(key=lambda finished: -finished[0])
        del search.finished[self._beams :]
        if not going_on:
            if not search.finished:  # every token would repeat an n-gram
                search.finished.append((search.running[0].score, search.running[0].tokens, "length"))
            search.is_over = True
            return
        going_on += [(_Beam(-math.inf, going_on[0][0].tokens), 0)] * (self._beams - len(going_on))
        search.running = [beam for beam, _ in going_on[: self._beams]]
        search.sources = [source for _, source in going_on[: self._beams]]
        is_full = len(search.finished) == self._beams
        search.is_over = is_full and search.running[0].score / divisor <= search.finished[-1][0]

    def _reorder(self, under_way: Sequence[_Search]) -> None:
        """Lets every hypothesis have the keys and values of the one it goes on from."""
        rows, sources, longest = [], [], 0
        for place, search in enumerate(self._searches):
            if search.is_over or not any(search is other for other in under_way):
                continue
            first = place * self._beams
            rows += [first + beam for beam in range(len(search.running))]
            sources += [first + source for source in search.sources]
            longest = max(longest, len(search.request.prompt) + len(search.running[0].tokens) - 1)
        if rows != sources:
            self._cache.reorder(rows, sources, longest)

    def _answer(self, search: _Search) -> Answer:
        score, tokens, end = search.finished[0]
        return Answer(search.number, tokens, self._stopping.text_of(search.request.prompt, tokens), end, score)

    def _remove(self, place: int) -> None:
        """The last search takes the rows of one that is over."""
        last = self._searches.pop()
        if place < len(self._searches):
            self._searches[place] = last
            length = len(last.request.prompt) + len(last.running[0].tokens) - 1
            rows = range(place * self._beams, place * self._beams + len(last.running))
            first = len(self._searches) * self._beams
            self._cache.reorder(rows, range(first, first + len(last.running)), length)
