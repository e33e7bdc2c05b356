"""How texts to be scored are put together: every beginning that is shared is read once."""

from __future__ import annotations

import torch

from megatron_med.inference.scoring import TOKENS_AT_ONCE, _passes
from megatron_med.inference.tree import Tree


def _read(requests: list[tuple[list[int], list[int]]], ranks: int = 1) -> int:
    """Tokens that the model reads, each shared beginning once a family."""
    passes = _passes(requests, ranks)
    families = {one.family: len(one.shared) for one in passes}
    own = sum(
        len(question.context) - len(one.shared) + sum(len(requests[number][1]) - 1 for number in question.requests)
        for one in passes
        for question in one.questions
    )
    return own + sum(families.values())


def test_a_question_is_read_once_for_all_of_its_options() -> None:
    requests = [(list(range(50)), [100 + option, 7, 8]) for option in range(4)]
    assert _read(requests) == 50 + 4 * 2


def test_examples_in_front_of_many_questions_are_read_once() -> None:
    examples = list(range(300))
    requests = [([*examples, 1000 + question, 5], [option]) for question in range(40) for option in range(4)]
    (shared,) = {one.shared for one in _passes(requests, 1)}
    assert shared == tuple(examples)
    assert _read(requests) == 300 + 40 * 2
    assert _read([(examples, [option]) for option in range(4)]) == 300, "one question has nobody to share with"
    same = [(examples, [1]), ([*examples, 5], [1]), ([*examples, 6], [1])]
    assert all(len(question.context) > len(one.shared) for one in _passes(same, 1) for question in one.questions)


def test_passes_are_full_sorted_and_shared_out() -> None:
    requests = [([number, *range(1 + number % 90)], [1]) for number in range(600)]
    passes = _passes(requests, 1)
    sizes = [[len(question.context) for question in one.questions] for one in passes]
    assert all(sum(size) <= TOKENS_AT_ONCE for size in sizes)
    assert [size for one in sizes for size in one] == sorted((len(context) for context, _ in requests), reverse=True)
    assert len(sizes) < 1.2 * sum(map(sum, sizes)) / TOKENS_AT_ONCE + 1
    assert len(_passes(requests, 8)) >= 8, "every replica and stage has work"
    numbers = [number for one in passes for question in one.questions for number in question.requests]
    assert sorted(numbers) == list(range(600))


def test_a_continuation_sees_its_context_and_itself() -> None:
    tree = Tree([1, 2], [[3], [4, 5, 6], [7, 8]])
    assert tree.tokens == [1, 2, 4, 5, 7]
    assert tree.positions(10) == [10, 11, 12, 13, 12]
    assert tree.places == [1, 1, 2, 3, 1, 4]
    assert tree.targets == [3, 4, 5, 6, 7, 8]
    seen = [row.nonzero().flatten().tolist() for row in tree.mask(1, torch.device("cpu"))]
    assert seen == [[0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 5]]
