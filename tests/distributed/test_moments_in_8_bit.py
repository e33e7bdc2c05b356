"""Checkpoints of moments in 8 bit: bitwise on the same grid, exact where blocks are aligned, to and from 32 bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_med.checkpoint.folder import step_folder
from megatron_med.checkpoint.load import load_optimizer
from megatron_med.config import Config
from megatron_med.kernels.blockwise import dequantize_blocks
from tests.ranks import run_ranks
from tests.training import MODELS, WIDE, make_config, set_up, stored_entries, train_and_save

GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {"sharding": "none"}),
    "dp2": (2, {}),
    "dp3": (3, {}),
    "full2": (2, {"sharding": "full"}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2-pp2-dp2": (8, {"tensor": 2, "pipeline": 2}),
}


def _config(prefix: Path, grid: str, family: str = "llama", name: str = "adamw8bit") -> tuple[Config, int]:
    ranks, parallel = GRIDS[grid]
    model = MODELS[family] | WIDE
    if family == "llama":
        model |= {"num_query_groups": 4, "ffn_hidden_size": 256}
    config = make_config(prefix, model, batch=12, steps=4, **parallel)
    config.optimizer.name = name  # type: ignore[assignment]
    return config, ranks


def _save(
    prefix: Path, target: Path, grid: str, source: Path | None, steps: tuple[int, int], **how: str
) -> list[float]:
    config, ranks = _config(prefix, grid, **how)
    return run_ranks(ranks, train_and_save, config, target, source, *steps)[0]


@pytest.mark.parametrize(
    ("grid", "family"), [("alone", "llama"), ("tp2-pp2-dp2", "llama"), ("alone", "gpt2"), ("full2", "gpt2")]
)
def test_a_resumed_run_is_bitwise_the_one_that_went_on(
    sample_data: Path, tmp_path: Path, grid: str, family: str
) -> None:
    whole, half, rest = (step_folder(tmp_path / name, 4) for name in ("whole", "half", "rest"))
    losses = _save(sample_data, whole, grid, None, (1, 4), family=family)
    first = _save(sample_data, half, grid, None, (1, 2), family=family)
    assert first + _save(sample_data, rest, grid, half, (3, 4), family=family) == losses
    expected, resumed = stored_entries(whole), stored_entries(rest)
    assert expected.keys() == resumed.keys()
    in_8_bit = {name for name, tensor in expected.items() if tensor.dtype == torch.uint8}
    assert any("attention.qkv.weight" in name for name in in_8_bit)
    assert not any("embedding" in name or "norm" in name for name in in_8_bit)
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name
    losses_32 = _save(sample_data, step_folder(tmp_path / "32", 4), grid, None, (1, 4), family=family, name="adamw")
    np.testing.assert_allclose(losses, losses_32, rtol=0.01)
    assert losses != losses_32


def load_and_tell(config: Config, source: Path) -> tuple[list[str], dict[str, Any]]:
    """What is told, and the moments of this rank by name, in fp32, with where they lie."""
    train_module, _ = set_up(config)
    optimizer, context = train_module.optimizer, train_module.context
    told = load_optimizer(source, optimizer, context, moments=True)
    found = {}
    for item in optimizer.owned:
        states = optimizer.states(item)
        for moment, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            values = states[moment]
            if values.dtype == torch.uint8:
                values = dequantize_blocks(values, states[f"{moment}_max"], signed)
            data = (context.fsdp.rank, context.fsdp.size) if optimizer.is_sharded else (0, 1)
            where = item.layout.slice_of((context.tp.rank, context.tp.size), data)
            found[f"{moment}.{item.layout.name}"] = (item.layout.global_shape, where, values.numpy().copy())
    return told, found


def _moments(prefix: Path, source: Path, grid: str, **how: str) -> tuple[list[str], dict[str, np.ndarray]]:
    config, ranks = _config(prefix, grid, **how)
    whole: dict[str, np.ndarray] = {}
    results = run_ranks(ranks, load_and_tell, config, source)
    for _, found in results:
        for name, (shape, where, values) in found.items():
            target = whole.setdefault(name, np.full(shape, np.nan, np.float32))
            target[tuple(slice(*ends) for ends in where)] = values
    assert not any(np.isnan(values).any() for values in whole.values())
    return results[0][0], whole


@pytest.mark.parametrize(("before", "after"), [("alone", "dp2"), ("dp2", "alone"), ("full2", "dp2"), ("dp2", "full2")])
def test_aligned_blocks_are_exact_on_another_grid(sample_data: Path, tmp_path: Path, before: str, after: str) -> None:
    source = step_folder(tmp_path, 2)
    _save(sample_data, source, before, None, (1, 2))
    told, here = _moments(sample_data, source, before)
    assert told == []
    told, there = _moments(sample_data, source, after)
    assert told == []
    for name, values in here.items():
        np.testing.assert_array_equal(values, there[name], err_msg=name)


@pytest.mark.parametrize(("before", "after"), [("alone", "tp2-pp2"), ("tp2-pp2-dp2", "dp3"), ("dp3", "alone")])
def test_other_blocks_are_quantised_again_and_the_error_told(
    sample_data: Path, tmp_path: Path, before: str, after: str
) -> None:
    source = step_folder(tmp_path, 2)
    _save(sample_data, source, before, None, (1, 2))
    _, here = _moments(sample_data, source, before)
    (line,), there = _moments(sample_data, source, after)
    assert "blocks lie otherwise on this grid and were quantised again" in line
    told = float(line.rsplit(" ", 2)[1])
    assert 0 < told < 3
    for name, values in here.items():
        error = np.linalg.norm(values - there[name]) / np.linalg.norm(values)
        assert error <= 1.05 * told / 100, name


@pytest.mark.parametrize("grid", ["dp2", "tp2-pp2"])
def test_8_and_32_bit_are_turned_into_each_other_and_told(sample_data: Path, tmp_path: Path, grid: str) -> None:
    source, wide = step_folder(tmp_path / "8", 2), step_folder(tmp_path / "32", 2)
    _save(sample_data, source, "alone", None, (1, 2))
    _save(sample_data, wide, "alone", None, (1, 2), name="adamw")
    _, here = _moments(sample_data, source, "alone")
    (line,), there = _moments(sample_data, source, grid, name="adamw")
    assert "were in 8 bit and go on in 32 bit" in line
    for name, values in here.items():
        np.testing.assert_array_equal(values, there[name], err_msg=name)
    (line,), narrow = _moments(sample_data, wide, grid)
    assert "were in 32 bit and go on in 8 bit" in line
    _, exact = _moments(sample_data, wide, "alone", name="adamw")
    for name, values in exact.items():
        assert np.linalg.norm(values - narrow[name]) <= 0.03 * np.linalg.norm(values), name
