"""Token files and the order of samples, against Megatron's own files, its GPTDataset and an independent walk."""

from __future__ import annotations

import filecmp
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_med.data import index as index_module
from megatron_med.data.blend import BlendedDataset
from megatron_med.data.gpt import PackedDataset
from megatron_med.data.index import build_blending_index, build_sample_index, integer_weights
from megatron_med.data.indexed import IndexedDataset, smallest_dtype
from megatron_med.data.indexed_writer import IndexedDatasetWriter
from megatron_med.data.sampler import micro_batch_places
from megatron_med.errors import DataError

SEED = 1234


@pytest.fixture(scope="module")
def megatron(shared: Path) -> Path:
    return shared / "megatron_index" / "meg-gpt2-openwebtext_text_document"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Ten documents of 1 to 37 tokens, one of them empty."""
    rng = np.random.default_rng(5)
    with IndexedDatasetWriter(tmp_path / "small", np.uint16) as writer:
        for length in (7, 1, 37, 0, 12, 5, 20, 3, 9, 30):
            writer.add_document(rng.integers(0, 500, length))
    return tmp_path / "small"


def test_megatron_file_is_read_exactly(megatron: Path) -> None:
    data = IndexedDataset(megatron)
    raw = np.fromfile(f"{megatron}.bin", np.uint16)
    assert (len(data), data.token_count, data.dtype) == (1000, 1361845, np.uint16)
    assert (data.sizes.min(), data.sizes.max()) == (193, 21809)
    assert data.document_borders.tolist() == list(range(1001))
    ends = np.cumsum(data.sizes)
    for document in (0, 1, 499, 999):
        np.testing.assert_array_equal(data.read(document), raw[ends[document] - data.sizes[document] : ends[document]])
        assert data.read(document)[-1] == 4999
    np.testing.assert_array_equal(data.read(3, 10, 5), data.read(3)[10:15])


def test_same_tokens_are_written_byte_for_byte(megatron: Path, tmp_path: Path) -> None:
    source = IndexedDataset(megatron)
    with IndexedDatasetWriter(tmp_path / "copy", source.dtype) as writer:
        writer.add_dataset(source)
    for suffix in ("bin", "idx"):
        assert filecmp.cmp(f"{megatron}.{suffix}", tmp_path / f"copy.{suffix}", shallow=False)


def test_vocabularies_choose_the_dtype() -> None:
    assert smallest_dtype(65499) is np.uint16
    assert smallest_dtype(65500) is np.int32


def _write(prefix: Path, documents: list[list[int]]) -> None:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)


def test_failed_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="do not fit into uint16"):
        _write(tmp_path / "x", [[1, 2], [70000]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        ("idx", lambda raw: b"NOTMAGIC" + raw[8:], "no Megatron index"),
        ("idx", lambda raw: raw[:9] + b"\x02" + raw[10:], "version 2"),
        ("idx", lambda raw: raw[:17] + b"\x07" + raw[18:], "dtype code 7"),
        ("idx", lambda raw: raw[:-8], "its header asks for"),
        ("idx", lambda raw: raw[:20], "ends inside its header"),
        ("bin", lambda raw: raw[:-2], "truncated"),
        ("bin", None, "There is no"),
        ("idx", None, "There is no"),
    ],
)
def test_damaged_files_are_named(small: Path, suffix: str, damage: Any, message: str) -> None:
    path = Path(f"{small}.{suffix}")
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        IndexedDataset(small)


def test_dtype_that_does_not_hold_the_vocabulary(small: Path) -> None:
    data = IndexedDataset(small)
    data.check_vocabulary(65536)
    with pytest.raises(DataError, match="uint16, which does not hold a vocabulary of 128256"):
        data.check_vocabulary(128256)


def _walk(sizes: list[int], order: list[int], length: int) -> list[list[tuple[int, int]]]:
    """Independent of the index: all tokens in order as (document, offset), cut into overlapping samples."""
    stream = [(document, offset) for document in order for offset in range(sizes[document])]
    return [stream[start : start + length + 1] for start in range(0, len(stream) - length, length)]


@pytest.mark.parametrize("native", [True, False], ids=["C++", "NumPy"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_sample_index_equals_a_plain_walk(native: bool, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=20))
    order = data.draw(st.permutations(range(len(sizes))))
    length = data.draw(st.integers(1, 40))
    builder = index_module._native if native else None
    assert builder is not None or not native, "the extension is not built"
    before, index_module._native = index_module._native, builder
    try:
        index = build_sample_index(np.array(sizes, np.int32), np.array(order, np.int64), length)
    finally:
        index_module._native = before
    samples = _walk(sizes, order, length)
    assert len(index) == len(samples) + 1
    for number, sample in enumerate(samples):
        if number:
            position, offset = index[number]
            assert (order[position], offset) == sample[0]
        position, offset = index[number + 1]
        assert (order[position], offset) == sample[-1]


def test_without_the_extension_one_line_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_native", None)
    monkeypatch.setattr(index_module, "_announced", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            build_sample_index(np.array([5], np.int32), np.array([0]), 2)
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "NumPy path serves" in caplog.text


@pytest.mark.parametrize("length", [128, 1024])
def test_first_epoch_equals_megatron_cores_gpt_dataset(megatron: Path, tmp_path: Path, length: int) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset as TheirIndexed
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        eod = 4999
        pad = 0
        vocab_size = 5000
        unique_identifiers: dict[str, str] = {"class": "test"}  # noqa: RUF012

    theirs_indexed = TheirIndexed(str(megatron), multimodal=False, mmap=True)
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=length,
        blend=([str(megatron)], None),
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    documents = np.arange(theirs_indexed.sequence_lengths.shape[0], dtype=np.int32)
    theirs = GPTDataset(theirs_indexed, str(megatron), documents, None, Split.train, config)
    ours = PackedDataset(IndexedDataset(megatron), length, SEED, tmp_path / "ours")
    assert len(theirs) == ours.samples_per_epoch
    for number in range(len(theirs)):
        sample = ours.sample(number).tokens
        np.testing.assert_array_equal(theirs[number]["tokens"].numpy(), sample[:-1])
        np.testing.assert_array_equal(theirs[number]["labels"].numpy(), sample[1:])


def test_first_epoch_equals_an_independent_implementation(megatron: Path, tmp_path: Path) -> None:
    """Megatron's published recipe, written down again: shuffle documents, cut, shuffle samples."""
    length = 512
    raw = np.fromfile(f"{megatron}.bin", np.uint16)
    data = IndexedDataset(megatron)
    starts = np.concatenate(([0], np.cumsum(data.sizes)))
    rng = np.random.RandomState(SEED)
    documents = np.arange(len(data), dtype=np.int32)
    rng.shuffle(documents)
    stream = np.concatenate([raw[starts[d] : starts[d + 1]] for d in documents])
    samples = (len(stream) - 1) // length
    shuffle = np.arange(samples, dtype=np.uint32)
    rng.shuffle(shuffle)
    ours = PackedDataset(data, length, SEED, tmp_path)
    assert ours.samples_per_epoch == samples
    for number, cut in enumerate(shuffle.tolist()):
        np.testing.assert_array_equal(ours.sample(number).tokens, stream[cut * length : (cut + 1) * length + 1])


def test_epochs_differ_and_each_is_complete(small: Path, tmp_path: Path) -> None:
    data = PackedDataset(IndexedDataset(small), 8, 3, tmp_path / "cache")
    count = data.samples_per_epoch
    assert count == (124 - 1) // 8
    epochs = [[tuple(data.sample(epoch * count + i).tokens.tolist()) for i in range(count)] for epoch in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = PackedDataset(IndexedDataset(small), 8, 3, tmp_path / "other")
    assert [tuple(again.sample(2 * count + i).tokens.tolist()) for i in range(count)] == epochs[2]


def test_corpus_shorter_than_a_sample_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs 1001"):
        PackedDataset(IndexedDataset(small), 1000, 3, tmp_path)


@pytest.mark.parametrize("native", [True, False], ids=["C++", "NumPy"])
@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 50, allow_nan=False), min_size=1, max_size=8),
    samples=st.integers(1, 400),
)
def test_every_prefix_is_within_one_sample_of_its_share(native: bool, weights: list[float], samples: int) -> None:
    before = index_module._native
    assert before is not None, "the extension is not built"
    index_module._native = before if native else None
    try:
        sets, numbers = build_blending_index(weights, samples)
    finally:
        index_module._native = before
    whole = integer_weights(weights)
    total = int(sum(map(int, whole)))
    taken = [0] * len(weights)
    for step, (chosen, number) in enumerate(zip(sets.tolist(), numbers.tolist(), strict=True), start=1):
        assert number == taken[chosen], "within a set the order is the set's own"
        taken[chosen] += 1
        for weight, count in zip(whole.tolist(), taken, strict=True):
            assert abs(weight * step - count * total) < total


def test_weights_become_exact_integers_and_builders_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [5.48, 40.7, 0.107, 0.42]  # GAP-Replay, billions of tokens
    assert integer_weights(weights).tolist() == [5480, 40700, 107, 420]
    native = build_blending_index(weights, 5000)
    monkeypatch.setattr(index_module, "_native", None)
    plain = build_blending_index(weights, 5000)
    shorter = build_blending_index(weights, 700)
    for ours, theirs, prefix in zip(native, plain, shorter, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(prefix, theirs[:700])


def test_blend_draws_each_corpus_in_its_own_order(small: Path, tmp_path: Path) -> None:
    corpora = [PackedDataset(IndexedDataset(small), 8, seed, tmp_path / "c") for seed in (1, 2)]
    stream = BlendedDataset(corpora, [3.0, 1.0], 40, tmp_path / "c")
    seen: list[list[tuple[int, ...]]] = [[], []]
    for number in range(40):
        corpus, _ = stream.locate(number)
        seen[corpus].append(tuple(stream.sample(number).tokens.tolist()))
    for corpus, samples in zip(corpora, seen, strict=True):
        assert samples == [tuple(corpus.sample(i).tokens.tolist()) for i in range(len(samples))]
    assert (len(seen[0]), len(seen[1])) == (30, 10)


@given(
    dp=st.integers(1, 8),
    micro=st.integers(1, 4),
    rounds=st.integers(1, 5),
    consumed=st.integers(0, 1000),
    short=st.integers(0, 3),
)
def test_no_sample_is_read_twice_or_lost(dp: int, micro: int, rounds: int, consumed: int, short: int) -> None:
    batch = max(1, dp * micro * rounds - short)
    ranks = [micro_batch_places(consumed, batch, micro, rank, dp) for rank in range(dp)]
    assert len({len(places) for places in ranks}) == 1
    samples = sorted(sample for places in ranks for place in places for sample in place.samples)
    assert samples == list(range(consumed, consumed + batch))


def test_nothing_is_written_beside_the_data(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for suffix in ("bin", "idx"):
        shutil.copy(f"{small}.{suffix}", folder / f"c.{suffix}")
    before = sorted(folder.iterdir())
    PackedDataset(IndexedDataset(folder / "c"), 8, 1, tmp_path / "cache").sample(0)
    assert sorted(folder.iterdir()) == before


def test_an_empty_document_takes_no_label(tmp_path: Path) -> None:
    """Of a sample that begins with one, every label counts but those across borders."""
    sizes = (7, 1, 37, 0, 12, 5, 20, 3, 9, 30, 0, 0)
    with IndexedDatasetWriter(tmp_path / "some", np.uint16) as writer:
        for number, size in enumerate(sizes):
            writer.add_document(np.full(size, number))
    packed = PackedDataset(IndexedDataset(tmp_path / "some"), 16, 4, tmp_path / "cache", isolate_documents=True)
    firsts = []
    for index in range(packed.samples_per_epoch):
        sample = packed.sample(index)
        numbers = np.asarray(sample.tokens, dtype=np.int64)  # of the document that each token is of
        np.testing.assert_array_equal(sample.loss_mask, numbers[1:] == numbers[:-1])
        assert sum(sample.document_lengths) == 16
        firsts.append(len(packed.parts(index)[0][2]))
    assert 0 in firsts, "no sample begins with an empty document"
