"""A checkpoint of one grid, loaded by another and saved again, holds the same values: weights, both moments."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_med.checkpoint.folder import CheckpointState, read_state, step_folder
from megatron_med.checkpoint.load import load_optimizer, verify_checkpoint
from megatron_med.checkpoint.save import save_checkpoint
from megatron_med.checkpoint.storage import Reader
from megatron_med.config.schema import Config
from megatron_med.train.step import train_step
from megatron_med.train.timers import StepTimer
from tests.ranks import run_ranks
from tests.training import MODELS, make_config, set_up

BATCH = 12  # every data-parallel size below divides it

# (tp, pp, dp, sharding); with dp = 3 and 5 no dimension divides evenly.
GRIDS: dict[str, tuple[int, int, int, str]] = {
    "1": (1, 1, 1, "none"),
    "tp2-pp2": (2, 2, 1, "optimizer"),
    "dp3": (1, 1, 3, "optimizer"),
    "tp2-dp3": (2, 1, 3, "optimizer"),
    "pp4": (1, 4, 1, "optimizer"),
    "pp2-dp2-whole": (1, 2, 2, "none"),
    "tp2-pp2-dp2": (2, 2, 2, "optimizer"),
}
PAIRS = [
    ("llama", "tp2-pp2", "dp3"),
    ("gpt2", "dp3", "tp2-pp2-dp2"),
    ("llama", "tp2-dp3", "pp4"),
    ("gpt2", "pp4", "1"),
    ("gpt2", "1", "tp2-dp3"),
    ("llama", "tp2-pp2-dp2", "pp2-dp2-whole"),
    ("gpt2", "pp2-dp2-whole", "tp2-pp2"),
    ("gpt2", "tp2-pp2", "pp4"),
]


def _config(prefix: Path, family: str, grid: str, precision: str = "fp32") -> tuple[Config, int]:
    tp, pp, dp, sharding = GRIDS[grid]
    config = make_config(
        prefix, MODELS[family], precision=precision, batch=BATCH, steps=4, tensor=tp, pipeline=pp, sharding=sharding
    )
    return config, tp * pp * dp


def _steps(config: Config, target: Path, source: Path | None, first: int, last: int) -> list[float]:
    """Loads ``source`` where there is one, trains steps ``first`` to ``last`` and saves."""
    machinery, loader = set_up(config)
    if source is not None:
        verify_checkpoint(source, machinery.context)
        load_optimizer(source, machinery.optimizer, machinery.context, moments=True)
        machinery.optimizer.steps = read_state(source).optimizer_steps or 0
        machinery.data_parallel.publish()
    losses = []
    for step in range(first, last + 1):
        batches = loader.load((step - 1) * BATCH, BATCH, step)
        losses.append(train_step(machinery, batches, 1e-3, False, StepTimer(torch.device("cpu"))).loss)
    state = CheckpointState(model=asdict(config.model), step=last, optimizer_steps=machinery.optimizer.steps)
    save_checkpoint(target, machinery.optimizer, machinery.context, state=state)
    return losses


def _entries(folder: Path) -> dict[str, np.ndarray]:
    reader = Reader(folder)
    return {name: reader.read(name).numpy() for name in reader.shapes()}


@pytest.mark.parametrize(("family", "before", "after"), PAIRS)
def test_values_survive_a_change_of_grid(
    sample_data: Path, tmp_path: Path, family: str, before: str, after: str
) -> None:
    first, second = step_folder(tmp_path, 2), step_folder(tmp_path / "again", 2)
    config, ranks = _config(sample_data, family, before)
    run_ranks(ranks, _steps, config, first, None, 1, 2)
    config, ranks = _config(sample_data, family, after)
    run_ranks(ranks, _steps, config, second, first, 1, 0)
    stored, again = _entries(first), _entries(second)
    assert stored.keys() == again.keys()
    weights = [name for name in stored if not name.startswith("optimizer.")]
    assert len(stored) == 3 * len(weights)
    for name, values in stored.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)
        if name.startswith("optimizer.exp_avg_sq"):
            assert values.max() > 0, f"{name} was never updated"
    assert read_state(second).optimizer_steps == 2


def test_uneven_slices_train_like_one_process(sample_data: Path, tmp_path: Path) -> None:
    """Three data-parallel ranks cut hidden 32 and vocabulary 512 into pieces of unequal length."""
    curves: list[Any] = []
    for grid in ("1", "dp3", "tp2-dp3"):
        config, ranks = _config(sample_data, "llama", grid)
        curves.append(run_ranks(ranks, _steps, config, tmp_path / grid / "step-00000004", None, 1, 4)[0])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-5)


def test_bf16_run_resumes_as_fp32(sample_data: Path, tmp_path: Path) -> None:
    """The checkpoint holds the fp32 masters, whatever the run's precision."""
    first, second = step_folder(tmp_path, 2), step_folder(tmp_path / "again", 2)
    config, ranks = _config(sample_data, "llama", "tp2-pp2", "bf16")
    run_ranks(ranks, _steps, config, first, None, 1, 2)
    config, ranks = _config(sample_data, "llama", "dp3", "fp32")
    run_ranks(ranks, _steps, config, second, first, 1, 0)
    stored, again = _entries(first), _entries(second)
    assert all(values.dtype == np.float32 for values in stored.values())
    for name, values in stored.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)
