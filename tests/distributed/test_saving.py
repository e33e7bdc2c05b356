"""Saving while training goes on: what is written is the state at the call; a failure reaches every rank."""

from __future__ import annotations

import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_med.checkpoint import save as saving
from megatron_med.checkpoint.folder import CheckpointState, complete_steps, resolve_checkpoint, step_folder
from megatron_med.checkpoint.save import CheckpointSaver
from megatron_med.checkpoint.storage import Reader
from megatron_med.config.schema import Config
from megatron_med.errors import CheckpointError
from tests.ranks import run_ranks
from tests.training import MODELS, make_config, one_step, set_up

PARALLEL = {"tensor": 2}
NAME = "layers.1.mlp.down.weight"


def _save_and_train_on(config: Config, checkpoints: Path) -> tuple[bool, np.ndarray, np.ndarray]:
    """The writer is held back until two more steps are done."""
    train_module, loader = set_up(config)
    gate, write = threading.Event(), saving._write

    def held_back(*arguments: Any) -> None:
        assert gate.wait(60), "training never went on"
        write(*arguments)

    saving._write = held_back
    committed: list[Path] = []
    saver = CheckpointSaver(train_module.context, asynchronous=True, on_commit=committed.append)
    one_step(train_module, loader, 1)
    (item,) = (item for item in train_module.optimizer.owned if item.layout.name == NAME)
    before = item.master.numpy().copy()
    state = CheckpointState(model=asdict(config.model), step=1)
    saver.save(step_folder(checkpoints, 1), train_module.optimizer, state)
    early = bool(complete_steps(checkpoints))
    one_step(train_module, loader, 2)
    gate.set()
    saver.wait()
    assert committed == ([step_folder(checkpoints, 1)] if train_module.context.world.is_first else [])
    saver.save(step_folder(checkpoints, 2), train_module.optimizer, state)  # the buffers serve again
    saver.wait()
    return early, before, item.master.numpy().copy()


def test_what_is_written_is_the_state_at_the_call(sample_data: Path, tmp_path: Path) -> None:
    config = make_config(sample_data, MODELS["llama"], steps=4, **PARALLEL)
    results = run_ranks(2, _save_and_train_on, config, tmp_path)
    assert not any(early for early, _, _ in results), "the save was not in the background"
    first, second = (Reader(step_folder(tmp_path, step)).read(NAME).numpy() for step in (1, 2))
    np.testing.assert_array_equal(first, np.concatenate([before for _, before, _ in results], axis=1))
    np.testing.assert_array_equal(second, np.concatenate([after for _, _, after in results], axis=1))
    assert (first != second).any()
    assert resolve_checkpoint(tmp_path) == step_folder(tmp_path, 2)


def _fail_to_save(config: Config, checkpoints: Path) -> str:
    train_module, _ = set_up(config)
    saver = CheckpointSaver(train_module.context, asynchronous=True, on_commit=lambda _: None)
    state = CheckpointState(model=asdict(config.model), step=1)
    saver.save(step_folder(checkpoints, 1), train_module.optimizer, state)
    saver.wait()
    if train_module.context.world.rank == 1:  # this rank alone meets a full disk
        saving.dcp.FileSystemWriter = _FullDisk
    saver.save(step_folder(checkpoints, 2), train_module.optimizer, state)
    try:
        saver.wait()
    except CheckpointError as error:
        assert not saver.has_failed, "told once"
        return str(error)
    return ""


class _FullDisk(saving.dcp.FileSystemWriter):
    def write_data(self, *arguments: Any) -> Any:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"sharding": "full"}], ids=str)
def test_a_failure_on_one_rank_reaches_all_and_the_last_good_one_stays(
    sample_data: Path, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    config = make_config(sample_data, MODELS["llama"], steps=4, **parallel)
    for message in run_ranks(2, _fail_to_save, config, tmp_path):
        assert "step-00000002 could not be written: [Errno 28] No space left on device" in message
        assert "The last good checkpoint stays: step-00000001" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
