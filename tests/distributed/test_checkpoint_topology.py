"""A checkpoint of one grid, loaded by another and saved again, holds the same values: weights, both moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_med.checkpoint.folder import read_state, step_folder
from megatron_med.config.schema import Config
from tests.ranks import run_ranks
from tests.training import MODELS, make_config, stored_entries, train_and_save

BATCH = 12  # every data-parallel size below divides it

# Every sharding mode, alone and hybrid, under every axis; with dp = 3 no dimension divides evenly.
GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {"sharding": "none"}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "dp3": (3, {}),
    "tp2-dp3": (6, {"tensor": 2}),
    "pp4": (4, {"pipeline": 4}),
    "pp2-chunks2": (2, {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2}),
    "pp2-dp2-whole": (4, {"pipeline": 2, "sharding": "none"}),
    "tp2-pp2-dp2": (8, {"tensor": 2, "pipeline": 2}),
    "hybrid2x2": (4, {"replicate": 2}),
    "full2": (2, {"sharding": "full"}),
    "full-tp2-dp2": (4, {"tensor": 2, "sharding": "full"}),
    "full-hybrid2x2": (4, {"sharding": "full", "replicate": 2}),
    "full-pp2-dp2": (4, {"pipeline": 2, "sharding": "full"}),
}
PAIRS = [
    ("llama", "tp2-pp2", "dp3"),
    ("gpt2", "dp3", "tp2-pp2-dp2"),
    ("llama", "tp2-dp3", "pp4"),
    ("gpt2", "pp4", "alone"),
    ("gpt2", "alone", "tp2-dp3"),
    ("llama", "tp2-pp2-dp2", "pp2-dp2-whole"),
    ("gpt2", "pp2-dp2-whole", "tp2-pp2"),
    ("gpt2", "tp2-pp2", "pp4"),
    ("llama", "alone", "full2"),
    ("gpt2", "alone", "full-tp2-dp2"),
    ("llama", "full2", "alone"),
    ("llama", "full2", "tp2-pp2"),
    ("gpt2", "full-tp2-dp2", "dp3"),
    ("gpt2", "full-tp2-dp2", "pp2-chunks2"),
    ("llama", "tp2-pp2", "full-hybrid2x2"),
    ("llama", "full-hybrid2x2", "hybrid2x2"),
    ("gpt2", "hybrid2x2", "full-pp2-dp2"),
    ("gpt2", "hybrid2x2", "full2"),
    ("llama", "full-pp2-dp2", "tp2-dp3"),
    ("llama", "full-pp2-dp2", "pp2-chunks2"),
    ("gpt2", "pp2-chunks2", "full-hybrid2x2"),
    ("llama", "pp2-chunks2", "full-tp2-dp2"),
    ("llama", "dp3", "full-pp2-dp2"),
    ("gpt2", "full-pp2-dp2", "hybrid2x2"),
]


def test_the_pairs_hold_every_grid_in_both_places() -> None:
    assert len(PAIRS) >= 20
    assert {before for _, before, _ in PAIRS} == {after for _, _, after in PAIRS} == GRIDS.keys()


def _config(prefix: Path, family: str, grid: str, precision: str = "fp32") -> tuple[Config, int]:
    ranks, parallel = GRIDS[grid]
    config = make_config(prefix, MODELS[family], precision=precision, batch=BATCH, steps=4, **parallel)
    return config, ranks


def _entries(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in stored_entries(folder).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a grid's own checkpoint is written once and read by several tests."""
    return tmp_path_factory.mktemp("checkpoints")


def _trained(prefix: Path, folder: Path, family: str, grid: str, precision: str = "fp32") -> Path:
    """Two steps of a grid from the initial weights."""
    step = step_folder(folder / f"{family}-{grid}-{precision}", 2)
    if not step.exists():
        config, ranks = _config(prefix, family, grid, precision)
        run_ranks(ranks, train_and_save, config, step, None, 1, 2)
    return step


@pytest.mark.parametrize(("family", "before", "after"), PAIRS)
def test_values_survive_a_change_of_grid(
    sample_data: Path, folder: Path, tmp_path: Path, family: str, before: str, after: str
) -> None:
    first, second = _trained(sample_data, folder, family, before), step_folder(tmp_path, 2)
    config, ranks = _config(sample_data, family, after)
    run_ranks(ranks, train_and_save, config, second, first, 1, 0)
    stored, again = _entries(first), _entries(second)
    _assert_near(stored, _entries(_trained(sample_data, folder, family, "alone")))
    assert stored.keys() == again.keys()
    weights = [name for name in stored if not name.startswith("optimizer.")]
    assert len(stored) == 3 * len(weights)
    for name, values in stored.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)
        if name.startswith("optimizer.exp_avg_sq"):
            assert values.max() > 0, f"{name} was never updated"
    assert read_state(second).optimizer_steps == 2


def _assert_near(stored: dict[str, np.ndarray], alone: dict[str, np.ndarray]) -> None:
    """Each slice stands under the right name at the right place: the values are those of one process."""
    assert stored.keys() == alone.keys()
    for name, expected in alone.items():
        if name.endswith("qkv.bias"):
            continue  # keys' biases have no true gradient, so Adam follows the rounding
        difference = np.linalg.norm(stored[name] - expected) / np.linalg.norm(expected)
        assert difference < 1e-3, f"{name} differs by {difference:.1e}"


def test_uneven_slices_train_like_one_process(sample_data: Path, tmp_path: Path) -> None:
    """Three data-parallel ranks cut hidden 32 and vocabulary 512 into pieces of unequal length."""
    curves: list[Any] = []
    for grid in ("alone", "dp3", "tp2-dp3"):
        config, ranks = _config(sample_data, "llama", grid)
        curves.append(run_ranks(ranks, train_and_save, config, tmp_path / grid / "step-00000004", None, 1, 4)[0])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-5)


@pytest.mark.parametrize("grid", ["tp2-pp2", "full2"])
def test_bf16_run_resumes_as_fp32(sample_data: Path, folder: Path, tmp_path: Path, grid: str) -> None:
    """The checkpoint holds the fp32 masters, whatever the run's precision."""
    first, second = _trained(sample_data, folder, "llama", grid, "bf16"), step_folder(tmp_path, 2)
    config, ranks = _config(sample_data, "llama", "dp3", "fp32")
    run_ranks(ranks, train_and_save, config, second, first, 1, 0)
    stored, again = _entries(first), _entries(second)
    assert all(values.dtype == np.float32 for values in stored.values())
    for name, values in stored.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)
