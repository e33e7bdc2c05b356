"""Conversations as samples: packing, masks, truncation, mixtures, and an order that depends on nothing else."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_med.config import load_config
from megatron_med.config.schema import DataConfig, DataSource
from megatron_med.data.indexed_writer import IndexedDatasetWriter
from megatron_med.data.instruct import ConversationStream, draw_epoch, open_conversations, shares_of
from megatron_med.data.packing import best_fit
from megatron_med.data.sources import roles_prefix
from megatron_med.errors import DataError
from megatron_med.tokenizer.chat import ANSWER, CONTEXT, SHARED
from tests.conftest import REPOSITORY

Conversation = tuple[list[int], list[int]]


def _write(prefix: Path, conversations: list[Conversation]) -> str:
    with IndexedDatasetWriter(prefix, np.uint16) as ids, IndexedDatasetWriter(roles_prefix(prefix), np.uint8) as roles:
        for tokens, kinds in conversations:
            ids.add_document(tokens)
            roles.add_document(kinds)
    return str(prefix)


def _many(count: int, seed: int, longest: int = 24) -> list[Conversation]:
    """Conversations whose first token is their number; the last third of each is an answer."""
    rng = np.random.RandomState(seed)
    found = []
    for number in range(count):
        length = int(rng.randint(3, longest + 1))
        answer = max(1, length // 3)
        roles = [CONTEXT] * (length - answer) + [ANSWER] * answer
        found.append(([1000 + number, *rng.randint(1, 900, length - 1).tolist()], roles))
    return found


def _stream(sources: list[DataSource], cache: Path, seed: int = 3, **options: object) -> ConversationStream:
    data = DataConfig(**{"sequence_length": 32, **options})  # type: ignore[arg-type]
    sets = [open_conversations(source.path, data, cache) for source in sources]
    return ConversationStream(sets, sources, data, seed, cache)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=80))
def test_best_fit_holds_every_item_once_and_no_bin_too_much(lengths: list[int]) -> None:
    sizes = np.array(lengths)
    items, starts = best_fit(sizes, 20)
    assert sorted(items.tolist()) == list(range(len(sizes)))
    bins = [sizes[items[begin:end]].sum() for begin, end in pairwise(starts)]
    assert 0 < min(bins) <= max(bins) <= 20
    assert sum(a + b <= 20 for n, a in enumerate(sorted(bins)) for b in sorted(bins)[n + 1 :]) == 0
    assert len(bins) <= 11 / 9 * -(-sizes.sum() // 20) + 4  # Johnson's bound


def test_best_fit_takes_the_fullest_bin_that_has_room() -> None:
    items, starts = best_fit(np.array([7, 5, 3, 4, 1]), 10)
    assert [items[a:b].tolist() for a, b in pairwise(starts)] == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_every_conversation_once(tmp_path: Path, packing: bool) -> None:
    conversations = _many(100, 1)
    stream = _stream([DataSource(_write(tmp_path / "a", conversations))], tmp_path, packing=packing)
    count = stream.samples_up_to(1)
    assert count == 100 if not packing else 30 < count < 60
    epochs = []
    for epoch in range(2):
        samples = range(stream.samples_up_to(epoch), stream.samples_up_to(epoch + 1))
        epochs.append([part for index in samples for part in stream.parts(index)])
        assert sorted(epochs[-1]) == [(0, number) for number in range(100)]
    assert epochs[0] != epochs[1]
    again = _stream([DataSource(str(tmp_path / "a"))], tmp_path / "other cache", packing=packing)
    assert again.parts(count + 3) == stream.parts(count + 3), "no earlier epoch has to be asked for"
    assert _stream([DataSource(str(tmp_path / "a"))], tmp_path, seed=4, packing=packing).parts(0) != stream.parts(0)


def test_a_packed_sample_trains_the_answers_and_no_border_and_no_padding(tmp_path: Path) -> None:
    conversations = _many(60, 2)
    stream = _stream([DataSource(_write(tmp_path / "a", conversations))], tmp_path)
    for index in range(stream.samples_up_to(1)):
        sample = stream.sample(index)
        parts = [conversations[number] for _, number in stream.parts(index)]
        tokens = [token for ids, _ in parts for token in ids]
        roles = [role if place else CONTEXT for _, kinds in parts for place, role in enumerate(kinds)]
        padding = 33 - len(tokens)
        np.testing.assert_array_equal(sample.tokens, tokens + [0] * padding)
        np.testing.assert_array_equal(sample.loss_mask, ([float(role == ANSWER) for role in roles] + [0] * padding)[1:])
        lengths = [len(ids) for ids, _ in parts] + [padding] * (padding > 0)
        lengths[-1] -= 1
        assert sample.document_lengths == tuple(length for length in lengths if length)


def test_padding_is_told_by_place_not_by_id(tmp_path: Path) -> None:
    """The end token may be 0, as the padding is: it counts all the same."""
    prefix = _write(tmp_path / "a", [([5, 6, 7, 0], [CONTEXT, CONTEXT, ANSWER, ANSWER])])
    for packing in (True, False):
        sample = _stream([DataSource(prefix)], tmp_path, sequence_length=6, packing=packing).sample(0)
        assert sample.tokens.tolist() == [5, 6, 7, 0, 0, 0, 0]
        assert sample.loss_mask.tolist() == [0, 1, 1, 0, 0, 0]
        assert sample.document_lengths == ((4, 2) if packing else (6,))


def test_all_tokens_or_answers_and_both_averages(tmp_path: Path) -> None:
    first = ([1, 2, 3, 4], [SHARED, SHARED, CONTEXT, ANSWER])
    second = ([5, 6, 7], [CONTEXT, ANSWER, ANSWER])
    source = [DataSource(_write(tmp_path / "a", [first, second]))]

    def masks(**options: str) -> dict[int, list[float]]:
        """Mask of each conversation, by its first token."""
        stream = _stream(source, tmp_path, sequence_length=3, packing=False, **options)
        samples = [stream.sample(index) for index in range(2)]
        return {int(sample.tokens[0]): sample.loss_mask.tolist() for sample in samples}

    assert masks() == {1: [0, 0, 1], 5: [1, 1, 0]}
    assert masks(loss="all") == {1: [0, 1, 1], 5: [1, 1, 0]}
    assert masks(loss_average="conversation") == {1: [0, 0, 1], 5: [0.5, 0.5, 0]}
    assert masks(loss="all", loss_average="conversation") == {1: [0, 0.5, 0.5], 5: [0.5, 0.5, 0]}


def test_what_is_too_long(tmp_path: Path) -> None:
    long = ([1, 2, 3, 4, 5, 6], [CONTEXT, CONTEXT, ANSWER, ANSWER, ANSWER, ANSWER])
    asked = ([1, 2, 3, 4, 5, 6], [CONTEXT] * 5 + [ANSWER])
    prefix = _write(tmp_path / "a", [([7, 8], [CONTEXT, ANSWER]), long, asked])
    source = DataSource(prefix)

    def opened(truncate: str) -> tuple[list[int], list[str]]:
        data = DataConfig(sequence_length=3, truncate=truncate)  # type: ignore[arg-type]
        found = open_conversations(prefix, data, tmp_path)
        return found.numbers.tolist(), found.told

    with pytest.raises(DataError, match=r"2 of 3 conversations do not fit .* the first is conversation 1 with 6"):
        opened("error")
    assert opened("drop") == ([0], [f"{prefix}: left out, too long: 2 conversations"])
    numbers, told = opened("right")
    assert numbers == [0, 1]
    assert "cut on the right to 4 tokens: 1 conversation, in 1 of them a part of an answer" in told[0]
    assert "left out, nothing that is trained would be kept: 1 conversation" in told[1]
    numbers, told = opened("left")
    assert numbers == [0, 1, 2]
    assert told == [f"{prefix}: cut on the left to 4 tokens: 2 conversations, in 0 of them a part of an answer"]
    options = {"sequence_length": 3, "packing": False}
    for truncate, ids in (("right", [1, 2, 3, 4]), ("left", [3, 4, 5, 6])):
        stream = _stream([source], tmp_path, truncate=truncate, **options)
        samples = [stream.sample(index).tokens.tolist() for index in range(stream.samples_up_to(1))]
        assert ids in samples


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    _write(tmp_path / "a", _many(5, 1))
    _write(tmp_path / "b", _many(6, 1))
    for suffix in (".bin", ".idx"):
        (tmp_path / f"b.roles{suffix}").replace(tmp_path / f"a.roles{suffix}")
    with pytest.raises(DataError, match=r"a\.roles\.bin does not belong to"):
        open_conversations(tmp_path / "a", DataConfig(sequence_length=32), tmp_path)


PUBLISHED = {
    "a": ([10178, 51760, 44246, 5, 5, 282, 3], [9.5587, 48.6105, 41.5537, 0.0047, 0.0047, 0.2648, 0.0028]),
    "b": (
        [10178, 182822, 211269, 51760, 54412, 24, 19, 19, 282, 3],
        [21.45, 25.69, 14.84, 18.18, 19.11, 0.05, 0.04, 0.04, 0.6, 0.006],
    ),
}
"""Samples and share of each file of BioMed-LLaMA's two mixtures, in per cent (its README)."""


def _mixture(name: str) -> DataConfig:
    path = REPOSITORY / "examples" / "biomed_llama" / "instruct" / f"mixture_{name}.yaml"
    return load_config([str(path)], 8).data


def test_the_published_shares_of_biomed_llama() -> None:
    """Within the digits given; medpalm's .05 is not what its weights give (.084): parts of it weigh 1 in the code."""
    counts, published = PUBLISHED["a"]
    np.testing.assert_allclose(100 * shares_of(counts, _mixture("a").train), published, atol=6e-5)
    counts, published = PUBLISHED["b"]
    data = _mixture("b")
    shares = 100 * shares_of(counts, data.train)
    others = [number for number in range(10) if number != 5]
    np.testing.assert_allclose(shares[others], np.array(published)[others], atol=1.4e-2)
    assert shares[5] == pytest.approx(0.084, abs=1e-3)
    sets, places = draw_epoch(counts, data.train, data, np.random.RandomState(5), 0, 5)
    assert len(sets) == 50_000
    np.testing.assert_allclose(np.bincount(sets, minlength=10) / 500, shares, atol=0.8)
    medqa = places[sets == 0]
    assert len(np.unique(medqa)) < len(medqa), "with replacement"
    assert medqa.max() < 10178


def test_mixtures_by_weight_and_by_repeat(tmp_path: Path) -> None:
    counts = [300, 100]
    data = DataConfig(sequence_length=8)
    sources = [DataSource("a", weight=1.0), DataSource("b", weight=3.0)]
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(3):
        sets, places = draw_epoch(counts, sources, data, np.random.RandomState(epoch), epoch, 7)
        assert np.bincount(sets).tolist() == [100, 300]
        for stop in (40, 200):
            assert abs((sets[:stop] == 1).sum() - 0.75 * stop) <= 1, "in every beginning, too"
        seen.update(zip(sets.tolist(), places.tolist(), strict=True))
    assert {seen[0, place] for place in range(300)} == {1}, "its own order goes on over the epochs"
    assert {seen[1, place] for place in range(100)} == {9}
    sources = [DataSource("a", repeat=0.5), DataSource("b", repeat=2.25)]
    sets, places = draw_epoch(counts, sources, data, np.random.RandomState(1), 0, 7)
    drawn = Counter(zip(sets.tolist(), places.tolist(), strict=True))
    assert [sum(n for (which, _), n in drawn.items() if which == number) for number in (0, 1)] == [150, 225]
    assert max(n for (which, _), n in drawn.items() if which == 0) == 1
    assert Counter(n for (which, _), n in drawn.items() if which == 1) == {2: 75, 3: 25}
