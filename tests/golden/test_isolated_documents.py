"""Documents packed into one sample, kept apart: the same as each of them alone, in our model and in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_med.checkpoint.folder import CheckpointState, step_folder
from megatron_med.checkpoint.huggingface.convert import export_huggingface
from megatron_med.checkpoint.save import save_checkpoint
from megatron_med.config.schema import Config
from megatron_med.kernels.functional import PackedDocuments, attention
from megatron_med.model.batch import MicroBatch
from megatron_med.tracing.recorder import Recorder
from tests.ranks import run_ranks
from tests.training import MODELS, make_config, set_up

SAMPLES = 4


def _parts(loader: Any, sample: int) -> list[np.ndarray]:
    """The documents, or parts of documents, of a sample of the only corpus."""
    (corpus,) = loader.dataset._corpora
    return [np.asarray(ids, np.int64) for _, _, ids in corpus.parts(sample)]


def _packed(config: Config, folder: Path) -> list[tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]]:
    """Documents, logits, mask and positions of packed samples; logits and gradients of the same documents alone are
    checked here."""
    train_module, loader = set_up(config)
    (chunk,) = train_module.chunks
    chunk.eval()
    state = CheckpointState(model=config.model.__dict__ | {}, optimizer_steps=0, run={"precision": "fp32"})
    save_checkpoint(step_folder(folder, 0), train_module.optimizer, train_module.context, state=state)
    export_huggingface(folder, folder / "hf")
    results = []
    for sample in range(SAMPLES):
        (batch,) = loader.load(sample, 1, 1)
        parts = _parts(loader, sample)
        logits = chunk(None, batch)
        gradients = _gradients(train_module, chunk.loss(logits, batch))
        losses = []
        for start, ids in _places(parts, logits.shape[0]):
            own = _alone(ids, batch, start)
            alone = chunk(None, own)
            torch.testing.assert_close(logits[start : start + len(ids)], alone)
            losses.append(chunk.loss(alone, own))
        for name, gradient in _gradients(train_module, torch.stack(losses).sum()).items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        values = logits[:, 0].detach().numpy()
        results.append((parts, values, batch.loss_mask[0].numpy(), batch.positions[0].numpy()))
    return results


def _alone(ids: np.ndarray, batch: MicroBatch, start: int) -> MicroBatch:
    """A document of a packed sample as a micro-batch of its own, with its labels."""
    own = slice(start, start + len(ids))
    tokens = torch.from_numpy(ids).unsqueeze(0)
    return MicroBatch(tokens, batch.labels[:, own], batch.loss_mask[:, own], torch.arange(len(ids)).unsqueeze(0))


def _gradients(train_module: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter."""
    train_module.data_parallel.begin_step(1000)
    loss.backward(retain_graph=True)
    return {item.layout.name: item.gradient.clone() for item in train_module.optimizer.owned}


def _places(parts: list[np.ndarray], length: int) -> list[tuple[int, np.ndarray]]:
    """Where each document starts among the inputs; the last id of a sample is a label only."""
    starts = np.cumsum([0, *map(len, parts)])
    places = [(int(start), ids[: length - start]) for start, ids in zip(starts, parts, strict=False)]
    return [(start, ids) for start, ids in places if len(ids)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_document_is_computed_as_if_it_were_alone(sentence_data: Path, tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    config = make_config(sentence_data, MODELS[family], sharding="none")
    config.data.sequence_length, config.data.isolate_documents = 64, True
    (results,) = run_ranks(1, _packed, config, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert max(len(parts) for parts, _, _, _ in results) >= 3, "samples of one document would prove nothing"
    for parts, logits, mask, positions in results:
        borders = np.cumsum([len(ids) for ids in parts])[:-1] - 1
        expected_mask = np.ones(len(mask))
        expected_mask[borders[borders < len(mask)]] = 0
        np.testing.assert_array_equal(mask, expected_mask)
        for start, ids in _places(parts, len(mask)):
            np.testing.assert_array_equal(positions[start : start + len(ids)], np.arange(len(ids)))
            with torch.no_grad():
                alone = theirs(torch.from_numpy(ids).unsqueeze(0)).logits[0]
            ours = torch.from_numpy(logits[start : start + len(ids), : alone.shape[1]])
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4)


def _projections(seq: int, batch: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries of four heads, keys and values of two groups."""
    generator = torch.Generator().manual_seed(seq)
    shapes = [(seq, batch, heads, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("lengths", [[3, 1, 8, 5, 7], [12, 12], [1] * 24])
def test_attention_over_documents_equals_each_alone(lengths: list[int]) -> None:
    """Output and gradients of two rows of twelve tokens, against plain attention over one document at a time."""
    query, key, value = _projections(12, 2, torch.float64)
    documents = PackedDocuments.of(lengths, torch.device("cpu"))
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()
    out = attention(query, key, value, causal=True, documents=documents)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    packed = torch.autograd.grad(out, (query, key, value), upstream)
    start, alone = 0, torch.zeros_like(out)
    for length in lengths:
        row, first = divmod(start, 12)
        place = slice(first, first + length), slice(row, row + 1)
        alone[place] = attention(query[place], key[place], value[place], causal=True)
        start += length
    torch.testing.assert_close(out, alone)
    for ours, expected in zip(packed, torch.autograd.grad(alone, (query, key, value), upstream), strict=True):
        torch.testing.assert_close(ours, expected)


def test_memory_of_attention_over_documents_is_linear_in_the_sequence() -> None:
    peaks = []
    for seq in (4096, 8192, 16384):
        recorder = Recorder()
        with recorder:
            query, key, value = _projections(seq, 1, torch.float32)
            documents = PackedDocuments.of([64] * (seq // 64), torch.device("cpu"))
            attention(query, key, value, causal=True, documents=documents).sum().backward()
        peaks.append(recorder.peak)
    assert peaks[1] / peaks[0] == pytest.approx(2, rel=0.05)
    assert peaks[2] / peaks[1] == pytest.approx(2, rel=0.05)


def _batch(config: Config) -> Any:
    _, loader = set_up(config)
    (batch,) = loader.load(0, 3, 1)
    return batch.documents, batch.loss_mask.sum(1).tolist(), [len(_parts(loader, sample)) for sample in range(3)]


def test_borders_travel_as_lengths(sentence_data: Path) -> None:
    """Rows that the batch does not fill are one document without loss."""
    config = make_config(sentence_data, MODELS["llama"], micro_batch=4)
    config.data.isolate_documents = True
    ((documents, counted, parts),) = run_ranks(1, _batch, config)
    assert documents is not None
    assert sum(documents.lengths) == 4 * 32
    assert documents.lengths[-1] == 32
    assert counted[-1] == 0
    assert len(documents.lengths) <= sum(parts) + 1
    config.data.isolate_documents = False
    assert run_ranks(1, _batch, config)[0][0] is None


def _loss(config: Config) -> Any:
    from megatron_med.train.step import validation_loss

    train_module, loader = set_up(config)
    return validation_loss(train_module, loader.load(0, 8, 1)), [
        (batch.labels[batch.loss_mask.bool()].tolist()) for batch in loader.load(0, 8, 1)
    ]


def test_the_switch_changes_the_loss_and_drops_the_labels_at_borders(sentence_data: Path) -> None:
    config = make_config(sentence_data, MODELS["llama"])
    ((packed, all_labels),) = run_ranks(1, _loss, config)
    config.data.isolate_documents = True
    ((isolated, fewer_labels),) = run_ranks(1, _loss, config)
    assert packed != isolated
    assert sum(map(len, fewer_labels)) < sum(map(len, all_labels))
