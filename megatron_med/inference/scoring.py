"""Log-likelihoods of many texts: sorted into passes of about the same size, every shared beginning computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_med.inference.cache import KeyValueCache
from megatron_med.inference.model import InferenceModel
from megatron_med.inference.request import not_finite
from megatron_med.inference.tree import Tree
from megatron_med.parallel.collectives import gather_objects

TOKENS_AT_ONCE = 2048
"""Tokens of one pass, unless a single text is longer."""
_TOKENS_AT_LEAST = 256
_FAMILY_TOKENS = 64
"""Texts that begin with the same tokens, at least so many, share them."""
_FAMILY_SIZE = 3
_SHORT = 16
"""A context of fewer tokens is read again for each continuation: nothing is saved by reading it once."""

Ids = Sequence[int]


@dataclass(frozen=True)
class Score:
    """How likely a continuation is behind its context.

    Attributes:
        log_likelihood: sum over its tokens.
        is_greedy: no token of it has a more likely one in its place.
    """

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class _Question:
    """A context and the requests that begin with it, by their index."""

    context: tuple[int, ...]
    requests: list[int]


@dataclass(frozen=True)
class _Pass:
    """Questions that are read together; the first ``shared`` tokens of their contexts are the same in all passes of
    this ``family``."""

    questions: list[_Question]
    family: int
    shared: tuple[int, ...]


def log_likelihoods(
    model: InferenceModel, requests: Sequence[tuple[Ids, Ids]], progress: Callable[[int], None] = lambda _: None
) -> list[Score]:
    """Scores of continuations, in the order of the requests, on every rank. Data-parallel ranks share them out.

    Args:
        model: on every rank of the grid.
        requests: context and continuation, at least a token each; together at most what the model can read.
        progress: is told after every pass how many requests of this rank's share have been read.

    Raises:
        CheckpointError: a log-likelihood is not finite.
    """
    replicas = model.context.batch
    stages = model.context.pp.size
    passes = _passes(requests, replicas.size * stages)
    found: dict[int, Score] = {}
    shared: KeyValueCache | None = None
    family = -1
    for one in passes[replicas.rank :: replicas.size]:
        if one.shared and one.family != family:
            shared, family = model.new_cache(1, len(one.shared)), one.family
            model.prefill([one.shared], shared, [0])
        found |= _read(model, one, requests, shared if one.shared else None)
        progress(sum(len(question.requests) for question in one.questions))
    merged: dict[int, Score] = {}
    for part in gather_objects(found, model.context.world):
        merged |= part
    if any(not math.isfinite(score.log_likelihood) for score in merged.values()):
        raise not_finite()
    return [merged[number] for number in range(len(requests))]


def _read(
    model: InferenceModel, one: _Pass, requests: Sequence[tuple[Ids, Ids]], shared: KeyValueCache | None
) -> dict[int, Score]:
    """Scores of one pass; none but on the last stage."""
    known = len(one.shared)
    trees = [
        Tree(question.context[known:], [requests[number][1] for number in question.requests])
        for question in one.questions
    ]
    scores = model.log_likelihoods(trees, shared, known)
    if scores is None:
        return {}
    numbers = [number for question in one.questions for number in question.requests]
    lengths = [len(requests[number][1]) for number in numbers]
    values = scores.cpu().split(lengths, dim=1)
    return {
        number: Score(value[0].sum().item(), bool(value[1].all()))
        for number, value in zip(numbers, values, strict=True)
    }


def _passes(requests: Sequence[tuple[Ids, Ids]], ranks: int) -> list[_Pass]:
    """Cuts the requests into passes, longest first, of families of questions with the same beginning."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(requests):
        assert context, "a context has a token at least"
        assert continuation, "a continuation has a token at least"
        by_context.setdefault(tuple(context), []).append(number)
    cut = {context: _cut(context, numbers, requests) for context, numbers in by_context.items()}
    passes = []
    for number, (shared, questions) in enumerate(_families(cut)):
        sizes = [(_size(question, requests, len(shared)), question) for question in questions]
        budget = min(TOKENS_AT_ONCE, max(_TOKENS_AT_LEAST, -(-sum(size for size, _ in sizes) // ranks)))
        passes += [_Pass(group, number, shared) for group in _packed(sizes, budget)]
    return passes


def _cut(context: tuple[int, ...], numbers: Sequence[int], requests: Sequence[tuple[Ids, Ids]]) -> list[list[int]]:
    """The requests of a context in groups that a pass can hold; each alone where sharing the context saves nothing."""
    if len(context) < _SHORT:
        return [[number] for number in numbers]
    groups: list[list[int]] = []
    room = 0
    for number in numbers:
        size = len(requests[number][1]) - 1
        if not groups or size > room:
            groups.append([])
            room = TOKENS_AT_ONCE - len(context)
        groups[-1].append(number)
        room -= size
    return groups


def _families(by_context: dict[tuple[int, ...], list[list[int]]]) -> Iterator[tuple[tuple[int, ...], list[_Question]]]:
    """Questions with the same beginning, and that beginning; all those with one of their own together."""
    families: dict[tuple[int, ...], list[_Question]] = {}
    for context, groups in by_context.items():
        family = families.setdefault(context[:_FAMILY_TOKENS], [])
        family += [_Question(context, numbers) for numbers in groups]
    alone: list[_Question] = []
    for questions in families.values():
        shared = _shared(questions)
        if shared:
            yield shared, questions
        else:
            alone += questions
    if alone:
        yield (), alone


def _shared(questions: Sequence[_Question]) -> tuple[int, ...]:
    """What all contexts of a family begin with, but for a last token of each; empty where it does not pay."""
    contexts = [question.context for question in questions]
    if len(contexts) < _FAMILY_SIZE or len(contexts[0]) < _FAMILY_TOKENS:
        return ()
    pairs = enumerate(zip(min(contexts), max(contexts), strict=False))  # what these two share, all share
    differ = next((place for place, (first, last) in pairs if first != last), len(min(contexts)))
    return contexts[0][: min(differ, min(map(len, contexts)) - 1)]


def _size(question: _Question, requests: Sequence[tuple[Ids, Ids]], known: int) -> int:
    """Tokens that the model reads for a question."""
    return len(question.context) - known + sum(len(requests[number][1]) - 1 for number in question.requests)


def _packed(sizes: Sequence[tuple[int, _Question]], budget: int) -> Iterator[list[_Question]]:
    group: list[_Question] = []
    tokens = 0
    for size, question in sorted(sizes, key=lambda pair: -pair[0]):
        if group and tokens + size > budget:
            yield group
            group, tokens = [], 0
        group.append(question)
        tokens += size
    if group:
        yield group
