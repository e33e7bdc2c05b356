"""Index, blend and loader at GAP-Replay's size and beyond, and what a warm start costs."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_med.data import cache as cache_module
from megatron_med.data import index as index_module
from megatron_med.data.blend import BlendedDataset
from megatron_med.data.gpt import PackedDataset, epoch_generator
from megatron_med.data.index import build_blending_index, build_sample_index, shuffled_range
from megatron_med.data.indexed import IndexedDataset
from megatron_med.data.indexed_writer import IndexedDatasetWriter
from megatron_med.data.loader import BatchLoader
from megatron_med.data.prefetch import Prefetcher
from megatron_med.parallel.context import Axis, ParallelContext

GAP_REPLAY = [107.0, 5480.0, 40700.0, 420.0]
"""Millions of tokens: guidelines, abstracts, papers, replay."""


@pytest.mark.parametrize("native", [True, False], ids=["C++", "NumPy"])
def test_the_order_is_numpys_own(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the generator goes on where RandomState.shuffle would have left it."""
    if not native:
        monkeypatch.setattr(index_module, "_native", None)
    for count in (0, 1, 2, 3, 31, 32, 33, 34, 1000, 65536, 65537, 2_000_003):
        ours, theirs = np.random.RandomState(7), np.random.RandomState(7)
        ours.rand(5), theirs.rand(5)
        expected = np.arange(count)
        theirs.shuffle(expected)
        order = shuffled_range(count, ours)
        assert order.dtype == np.uint32
        np.testing.assert_array_equal(order, expected)
        assert ours.randint(1 << 30) == theirs.randint(1 << 30)


def test_an_epoch_of_millions_equals_megatron_cores() -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import _build_document_index, _build_shuffle_index

    sizes = np.random.default_rng(0).lognormal(6, 1.5, 2_000_000).astype(np.int32)  # some of them empty
    theirs = np.random.RandomState(3)
    documents = _build_document_index(np.arange(len(sizes), dtype=np.int32), 1, theirs, False)
    samples = helpers.build_sample_idx(sizes, documents, 2048, 1, int(sizes.sum(dtype=np.int64)), True, 1)
    shuffle = _build_shuffle_index(len(samples) - 1, len(samples) - 1, theirs)
    rng = epoch_generator(3, 0)
    ours = shuffled_range(len(sizes), rng)
    np.testing.assert_array_equal(ours, documents)
    index = build_sample_index(sizes, ours, 2048)
    np.testing.assert_array_equal(index, samples)
    np.testing.assert_array_equal(shuffled_range(len(index) - 1, rng), shuffle)


@pytest.mark.parametrize("native", [True, False], ids=["C++", "NumPy"])
def test_five_trillion_tokens_in_samples_of_65536(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every count is 64 bits wide: 76 million samples, borders checked against exact arithmetic."""
    if not native:
        monkeypatch.setattr(index_module, "_native", None)
    length, documents = 65_536, 2_500_000
    sizes = np.random.default_rng(1).integers(1_500_000, 2_500_000, documents, dtype=np.int32)
    order = shuffled_range(documents, np.random.RandomState(1))
    ends = np.cumsum(sizes[order], dtype=np.int64)
    assert ends[-1] > 4.99e12
    index = build_sample_index(sizes, order, length)
    assert index.dtype == np.int64
    assert len(index) == (int(ends[-1]) - 1) // length + 1
    for sample in [0, 1, 32_767, 32_768, 2**25, len(index) - 1, *range(0, len(index), 7_654_321)]:
        document, offset = index[sample].tolist()
        begin = int(ends[document - 1]) if document else 0
        assert begin + offset == sample * length
        assert 0 <= offset < sizes[order[document]]


def test_gap_replays_weights_at_every_prefix() -> None:
    """Within one sample of the exact share, over the 11.8 million samples of the 70B run's whole schedule."""
    samples = 23_000 * 512
    sets, numbers = build_blending_index(GAP_REPLAY, samples)
    total = int(sum(GAP_REPLAY))
    steps = np.arange(1, samples + 1, dtype=np.int64)
    for number, weight in enumerate(GAP_REPLAY):
        taken = np.cumsum(sets == number, dtype=np.int64)
        assert np.abs(int(weight) * steps - total * taken).max() < total
        assert taken[-1] == pytest.approx(samples * weight / total, abs=1)
        np.testing.assert_array_equal(numbers[sets == number], np.arange(taken[-1]))


@pytest.fixture
def corpora(tmp_path: Path) -> list[PackedDataset]:
    """A small and a large corpus whose every token tells where it stands."""
    made = []
    for name, documents in (("small", 40), ("large", 900)):
        with IndexedDatasetWriter(tmp_path / name, np.int32) as writer:
            start = 1_000_000 * len(made)
            for size in np.random.default_rng(documents).integers(1, 60, documents).tolist():
                writer.add_document(np.arange(start, start + size))
                start += size
        made.append(PackedDataset(IndexedDataset(tmp_path / name), 32, 3, tmp_path / "cache"))
    return made


def test_epochs_of_a_small_set_beside_one_of_a_large(corpora: list[PackedDataset], tmp_path: Path) -> None:
    small, large = corpora
    epochs = 4
    samples = epochs * small.samples_per_epoch + large.samples_per_epoch // 2
    weights = [float(epochs * small.samples_per_epoch), float(large.samples_per_epoch // 2)]
    stream = BlendedDataset(corpora, weights, samples, tmp_path / "cache")
    seen: list[list[tuple[int, ...]]] = [[], []]
    for number in range(samples):
        seen[stream.locate(number)[0]].append(tuple(stream.sample(number).tokens.tolist()))
    count = small.samples_per_epoch
    assert len(seen[0]) == epochs * count
    covers = []
    for epoch in range(epochs):
        part = seen[0][epoch * count : (epoch + 1) * count]
        tokens = [token for sample in part for token in sample[:-1]]
        assert len(set(tokens)) == len(tokens), "no token twice in an epoch"
        covers.append(part)
    assert all(covers[0] != cover for cover in covers[1:]), "every epoch has an order of its own"
    assert len(set(seen[1])) == len(seen[1]), "the large set is in its first epoch"


def test_content_and_order_are_equal_at_any_data_parallel_size(corpora: list[PackedDataset], tmp_path: Path) -> None:
    stream = BlendedDataset(corpora, [1.0, 5.0], 96, tmp_path / "cache")
    wanted = np.stack([stream.sample(number).tokens[:-1] for number in range(96)])
    for size in (1, 2, 4, 8):
        steps = []
        for step in range(4):
            ranks = []
            for rank in range(size):
                context = ParallelContext(torch.device("cpu"), batch=Axis(size, rank))
                loader = BatchLoader(
                    stream, context, sequence_length=32, micro_batch_size=1, vocab_size=2_000_000, seed=1
                )
                ranks.append([batch.tokens for batch in loader.load(step * 24, 24, step)])
            steps += [ranks[turn % size][turn // size][0].numpy() for turn in range(24)]
        np.testing.assert_array_equal(np.stack(steps), wanted)


def test_a_warm_start_hashes_nothing_and_reads_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = np.random.default_rng(0).integers(1, 3000, 200_000, dtype=np.int32)
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_documents(b"", sizes)
    with (tmp_path / "c.bin").open("ab") as file:
        file.truncate(2 * int(sizes.sum(dtype=np.int64)))
    first = PackedDataset(IndexedDataset(tmp_path / "c"), 128, 1, tmp_path / "cache")
    wanted = first.parts(12_345)[0][:2]

    def refused(*_: object) -> None:
        raise AssertionError("a warm start reads whole files")

    monkeypatch.setattr(cache_module, "sha256", refused)
    monkeypatch.setattr("megatron_med.data.gpt.fingerprint", refused)
    monkeypatch.setattr(IndexedDataset, "token_count", property(refused))
    again = PackedDataset(IndexedDataset(tmp_path / "c"), 128, 1, tmp_path / "cache")
    assert again.parts(12_345)[0][:2] == wanted
    assert again.fingerprint == first.fingerprint


def test_a_changed_file_is_noticed_on_a_warm_start(tmp_path: Path) -> None:
    for value in (1, 2):
        with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
            writer.add_document(np.full(100 * value, value))
        data = PackedDataset(IndexedDataset(tmp_path / "c"), 10, 1, tmp_path / "cache")
        assert data.samples_per_epoch == (100 * value - 1) // 10
        assert data.sample(0).tokens.tolist() == [value] * 11


def test_the_next_item_is_read_ahead_in_order() -> None:
    asked: list[int] = []

    def load(number: int) -> int:
        asked.append(number)
        return number * number

    with Prefetcher(load, 6) as prefetcher:
        assert [prefetcher.take(number) for number in (3, 4)] == [9, 16]
        prefetcher._next[1].result()
        assert asked == [3, 4, 5], "one ahead, no more"
        assert [prefetcher.take(number) for number in (5, 6)] == [25, 36]
    assert asked == [3, 4, 5, 6], "nothing after the last"


def test_a_fault_of_the_reader_shows_where_its_item_is_taken() -> None:
    def load(number: int) -> int:
        if number == 2:
            raise ValueError("damaged sample")
        return number

    with Prefetcher(load, 9) as prefetcher:
        assert prefetcher.take(1) == 1
        with pytest.raises(ValueError, match="damaged sample"):
            prefetcher.take(2)


def test_shares_are_exact_for_decimal_weights() -> None:
    sets, _ = build_blending_index([0.1, 0.2, 0.7], 1000)
    for number, share in enumerate((Fraction(1, 10), Fraction(2, 10), Fraction(7, 10))):
        assert int((sets == number).sum()) == 1000 * share
