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
from megatron_med.data.loader import isolation
from megatron_med.model.batch import MicroBatch
from tests.ranks import run_ranks
from tests.training import MODELS, make_config, set_up

SAMPLES = 4


def _packed(config: Config, folder: Path) -> list[tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]]:
    """Documents, logits, mask and positions of packed samples; the same documents' logits alone are checked here."""
    train_module, loader = set_up(config)
    (chunk,) = train_module.chunks
    chunk.eval()
    state = CheckpointState(model=config.model.__dict__ | {}, optimizer_steps=0, run={"precision": "fp32"})
    save_checkpoint(step_folder(folder, 0), train_module.optimizer, train_module.context, state=state)
    export_huggingface(folder, folder / "hf")
    results = []
    for sample in range(SAMPLES):
        (batch,) = loader.load(sample, 1, 1)
        pieces = [np.asarray(piece, np.int64) for piece in loader.dataset.pieces(sample)]
        with torch.no_grad():
            logits = chunk(None, batch)[:, 0]
            for start, piece in _places(pieces, logits.shape[0]):
                ids = torch.from_numpy(piece).unsqueeze(0)
                own = MicroBatch(ids, ids, torch.ones(ids.shape), torch.arange(len(piece)).unsqueeze(0))
                torch.testing.assert_close(logits[start : start + len(piece)], chunk(None, own)[:, 0])
        results.append((pieces, logits.numpy(), batch.loss_mask[0].numpy(), batch.positions[0].numpy()))
    return results


def _places(pieces: list[np.ndarray], length: int) -> list[tuple[int, np.ndarray]]:
    """Where each document starts among the inputs; the last id of a sample is a label only."""
    starts = np.cumsum([0, *map(len, pieces)])
    places = [(int(start), piece[: length - start]) for start, piece in zip(starts, pieces, strict=False)]
    return [(start, piece) for start, piece in places if len(piece)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_document_is_computed_as_if_it_were_alone(sentence_data: Path, tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    config = make_config(sentence_data, MODELS[family], sharding="none")
    config.data.sequence_length, config.data.isolate_documents = 64, True
    (results,) = run_ranks(1, _packed, config, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert max(len(pieces) for pieces, _, _, _ in results) >= 3, "samples of one document would prove nothing"
    for pieces, logits, mask, positions in results:
        borders = np.cumsum([len(piece) for piece in pieces])[:-1] - 1
        expected_mask = np.ones(len(mask))
        expected_mask[borders[borders < len(mask)]] = 0
        np.testing.assert_array_equal(mask, expected_mask)
        for start, piece in _places(pieces, len(mask)):
            np.testing.assert_array_equal(positions[start : start + len(piece)], np.arange(len(piece)))
            with torch.no_grad():
                alone = theirs(torch.from_numpy(piece).unsqueeze(0)).logits[0]
            ours = torch.from_numpy(logits[start : start + len(piece), : alone.shape[1]])
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4)


def test_positions_and_attention_of_two_documents() -> None:
    positions, allowed = isolation(torch.tensor([[0, 0, 0, 1, 1], [4, 5, 5, 5, 6]]))
    assert positions.tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 0]]
    assert allowed.shape == (2, 1, 5, 5)
    assert allowed[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


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
