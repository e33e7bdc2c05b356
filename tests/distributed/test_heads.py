"""Heads that score train alike on one process and on every grid, and their parameters come back."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_med.checkpoint.huggingface.convert import export_huggingface
from megatron_med.config.schema import Config
from tests.heads import preprocess_choice, preprocess_classes, with_separator, write_questions, write_texts
from tests.ranks import run_ranks
from tests.training import MODELS, Trained, gather, make_config, stored_entries, train_and_save, train_ranks

GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2, interleaved": (
        4,
        {"tensor": 2, "pipeline": 2, "virtual_stages": 2, "schedule": "interleaved"},
    ),
    "tensor 2 without sequence parallelism, zero bubble": (
        4,
        {"tensor": 2, "pipeline": 2, "schedule": "zero_bubble", "sequence_parallel": False},
    ),
    "tensor 2, pipeline 2, data 2": (8, {"tensor": 2, "pipeline": 2}),
    "fully sharded": (4, {"tensor": 2, "sharding": "full"}),
}


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory, sample_tokenizer: Path) -> dict[str, Path]:
    """Token files for both kinds."""
    folder = tmp_path_factory.mktemp("labelled")
    tokenizer = with_separator(sample_tokenizer, folder / "tokenizer")
    preprocess_choice(write_questions(folder / "q.jsonl", 60, 0), tokenizer, folder / "multiple_choice")
    preprocess_classes(write_texts(folder / "t.json", 90, 0), tokenizer, folder / "classification")
    return {kind: folder / kind for kind in ("multiple_choice", "classification")}


def _config(prefix: Path, family: str, **parallel: Any) -> Config:
    kind = prefix.name
    labels = {"num_labels": 3} if kind == "classification" else {}
    model = MODELS[family] | {"vocab_size": 515, "head": kind, **labels}
    config = make_config(prefix, model, steps=12, micro_batch=2, **parallel)
    return replace(config, data=replace(config.data, sequence_length=160))


@cache
def _alone(prefix: Path, family: str) -> Trained:
    return gather(run_ranks(1, train_ranks, _config(prefix, family)))


@pytest.mark.parametrize(
    ("kind", "family", "grid"),
    [
        ("multiple_choice", "gpt2", "tensor 2, interleaved"),
        ("classification", "llama", "tensor 2 without sequence parallelism, zero bubble"),
        ("classification", "gpt2", "tensor 2, pipeline 2, data 2"),
        ("multiple_choice", "gpt2", "fully sharded"),
    ],
)
def test_a_grid_trains_like_one_process(prefixes: dict[str, Path], kind: str, family: str, grid: str) -> None:
    ranks, parallel = GRIDS[grid]
    alone = _alone(prefixes[kind], family)
    assert alone.losses[-1] < alone.losses[0] - 0.02, "the head does not learn: equal losses would prove nothing"
    found = gather(run_ranks(ranks, train_ranks, _config(prefixes[kind], family, **parallel)))
    np.testing.assert_allclose(found.losses, alone.losses, rtol=2e-5)
    assert found.gradients.keys() == alone.gradients.keys()
    assert "score.weight" in found.gradients
    assert ("score.bias" in found.gradients) == (kind == "multiple_choice")
    for name, gradient in found.gradients.items():
        near = 1e-5 * np.abs(alone.gradients[name]).max() + 1e-7  # what shifts all options alike has no gradient
        np.testing.assert_allclose(gradient, alone.gradients[name], atol=near, err_msg=name)


def test_a_run_goes_on_on_another_grid(prefixes: dict[str, Path], tmp_path: Path) -> None:
    prefix = prefixes["multiple_choice"]
    whole = run_ranks(1, train_and_save, _config(prefix, "gpt2"), tmp_path / "whole", None, 1, 6)[0]
    first = run_ranks(1, train_and_save, _config(prefix, "gpt2"), tmp_path / "half", None, 1, 3)[0]
    grid = _config(prefix, "gpt2", tensor=2, pipeline=2)
    then = run_ranks(4, train_and_save, grid, tmp_path / "rest", tmp_path / "half", 4, 6)[0]
    np.testing.assert_allclose([*first, *then], whole, rtol=1e-5)
    entries = stored_entries(tmp_path / "rest")
    assert "head.weight" not in entries
    wanted = stored_entries(tmp_path / "whole")
    assert entries.keys() == wanted.keys()
    for name in ("score.weight", "optimizer.exp_avg.score.weight", "optimizer.exp_avg_sq.score.weight"):
        scale = float(wanted[name].abs().max())
        np.testing.assert_allclose(entries[name], wanted[name], atol=1e-3 * scale, err_msg=name)


def test_a_gpt2_classifier_is_exported_as_transformers_has_it(prefixes: dict[str, Path], tmp_path: Path) -> None:
    """Its logits are compared by the export itself, and its class and labels stand in the folder."""
    config = _config(prefixes["classification"], "gpt2")
    head = {"kind": "classification", "labels": ["yes", "no", "maybe"], "separator": "", "max_length": 64}
    run_ranks(1, train_and_save, config, tmp_path / "step-00000006", None, 1, 6, head)
    export_huggingface(tmp_path / "step-00000006", tmp_path / "hf", verify=True)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["architectures"] == ["GPT2ForSequenceClassification"]
    assert written["id2label"] == {"0": "yes", "1": "no", "2": "maybe"}
