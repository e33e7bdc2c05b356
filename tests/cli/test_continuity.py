"""A resumed run keeps its learning rate's curve, and tells what it does otherwise than before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_med.checkpoint.folder import describe_files, read_state, resolve_checkpoint
from megatron_med.config.schema import LRScheduleConfig
from megatron_med.kernels import backend
from megatron_med.optim.lr_schedule import learning_rate
from tests.cli.processes import TRAIN, read_metrics, started_forked, train, wait_for_step, write_config

LR = 4e-3
SCHEDULE = {"warmup_steps": 2, "min_lr": 1e-4}


@pytest.fixture
def config(tmp_path: Path, sample_data: Path) -> Path:
    return write_config(
        tmp_path,
        sample_data,
        model={"preset": "gpt2-tiny", "vocab_size": 512},
        data={"sequence_length": 64},
        train={"steps": 8},
        optimizer={"lr": LR},
        lr_schedule=SCHEDULE,
        checkpoint={"interval": 4, "keep": 0},
    )


def _rates(run: Path) -> list[float]:
    return [line["lr"] for line in read_metrics(run)]


def _curve(steps: int, horizon: int) -> list[float]:
    schedule = LRScheduleConfig(**SCHEDULE)
    return [learning_rate(schedule, LR, step, horizon) for step in range(1, steps + 1)]


def test_more_steps_do_not_bend_the_learning_rate(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(config).returncode == 0
    done = train(config, "--train.steps", 12)
    assert "changed from step 9 on: train.steps 8 -> 12\n" in done.stdout
    assert done.stdout.count("changed from") == 1
    assert "warning: the learning rate's decay ends at step 8" in done.stderr
    assert "steps 9 to 12 have lr_schedule.min_lr = 0.0001" in done.stderr
    assert _rates(run) == _curve(12, 8)
    state = json.loads((run / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert state["settings"]["lr_schedule.decay_steps"] == 8

    done = train(config, "--train.steps", 16, "--lr_schedule.decay_steps", 40)
    assert "changed from step 13 on: lr_schedule.decay_steps 8 -> 40\n" in done.stdout
    assert "warning" not in done.stderr
    assert _rates(run) == _curve(12, 8) + _curve(16, 40)[12:]
    assert train(config, "--train.steps", 17).returncode == 0
    assert _rates(run)[16:] == _curve(17, 40)[16:]


def test_a_run_that_was_stopped_early_decays_as_planned(config: Path, tmp_path: Path) -> None:
    """Fewer steps than the warm-up has are fine, too, once the end of the decay is known."""
    done = train(config, "--train.steps", 3, "--lr_schedule.warmup_steps", 4)
    assert done.returncode == 2
    assert "between 0 and the end of the decay, step 3" in done.stderr
    assert train(config, "--lr_schedule.decay_steps", 8, "--train.steps", 4).returncode == 0
    assert train(config, "--train.steps", 6, "--lr_schedule.warmup_steps", 7).returncode == 0
    done = train(config, "--train.steps", 7, "--lr_schedule.warmup_steps", 9)
    assert done.returncode == 2
    assert "lr_schedule.warmup_steps is 9: it must lie between 0 and the end of the decay, step 8" in done.stderr


def test_a_run_of_an_older_version_keeps_the_horizon_of_its_configuration(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(config).returncode == 0
    _make_old(run, 8)
    done = train(config, "--train.steps", 10, "--optimizer.lr", 2e-3)
    assert "changed from step 9 on: optimizer.lr 0.004 -> 0.002\n" in done.stdout
    assert "the learning rate's decay ends at step 8" in done.stderr
    assert _rates(run)[8:] == [1e-4, 1e-4]
    _make_old(run, 10)
    stored = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({"train": stored["train"]}))
    assert "decay ends at step 10" in train(config, "--train.steps", 11).stderr
    _make_old(run, 11)
    (run / "config.yaml").unlink()
    done = train(config, "--train.steps", 12)
    assert done.returncode == 0
    assert "changed" not in done.stdout


def test_an_older_runs_horizon_outlives_a_start_that_saved_nothing(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(config).returncode == 0
    _make_old(run, 8)
    arguments = ("--train.steps", 40, "--checkpoint.interval", 0)
    with started_forked([*TRAIN, str(config), "--train.steps", "100000", *map(str, arguments[2:])]) as process:
        wait_for_step(run, 9, process, process.output)
        process.kill()
    assert "the learning rate's decay ends at step 8" in train(config, *arguments).stderr
    assert _rates(run)[8:12] == [1e-4] * 4


def test_everything_that_changes_the_curve_is_told(config: Path, tmp_path: Path) -> None:
    assert train(config, "--train.steps", 4).returncode == 0
    options = {
        "optimizer.lr": "0.001",
        "optimizer.name": "decoupled_adamw",
        "optimizer.betas": "[0.9, 0.99]",
        "optimizer.weight_decay": "0.02",
        "lr_schedule.name": "linear",
        "train.global_batch_size": "16",
        "precision": "bf16",
    }
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    done = train(config, "--train.steps", 4, *given)
    assert done.returncode == 0
    changed = dict(line.split(" on: ")[1].split(" ", 1) for line in done.stdout.splitlines() if "changed" in line)
    assert {name: change.split(" -> ")[1] for name, change in changed.items()} == options
    assert changed["optimizer.lr"] == "0.004 -> 0.001"
    silent = train(config, "--train.steps", 4, *given, "--logging.interval", 2, "--checkpoint.keep", 1)
    assert silent.stdout.count("changed") == len(options)  # no step was taken: the checkpoint is still the old one


def test_a_run_that_begins_with_all_of_another_keeps_its_curve(config: Path, tmp_path: Path) -> None:
    assert train(config).returncode == 0
    other = ("--train.output_dir", tmp_path / "other", "--train.steps", 10)
    done = train(config, *other, "--checkpoint.load", tmp_path / "run", "--checkpoint.load_state", "all")
    assert "changed from step 9 on: train.steps 8 -> 10" in done.stdout
    assert _rates(tmp_path / "other") == [1e-4, 1e-4]
    fresh = ("--train.output_dir", tmp_path / "fresh", "--checkpoint.load", tmp_path / "run")
    done = train(config, *fresh, "--optimizer.lr", 2e-3)
    assert "changed" not in done.stdout
    assert max(_rates(tmp_path / "fresh")) == 2e-3


def test_the_micro_batch_counts_where_there_is_dropout(config: Path) -> None:
    """Masks are seeded by micro-batch."""
    for dropout, told in ((0.0, False), (0.1, True)):
        run = ("--train.output_dir", config.parent / f"run-{dropout}", "--model.hidden_dropout", dropout)
        assert train(config, *run, "--train.steps", 2).returncode == 0
        done = train(config, *run, "--train.steps", 2, "--train.micro_batch_size", 4)
        assert ("train.micro_batch_size 2 -> 4" in done.stdout) is told


def _make_old(run: Path, step: int) -> None:
    """Takes the settings out of a checkpoint's state, as older versions wrote it."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    state = json.loads((folder / "state.json").read_text())
    del state["settings"]
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] |= describe_files(folder, ["state.json"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (run / "config.first.yaml").unlink(missing_ok=True)


@pytest.mark.skipif("native" not in backend.serving("cpu"), reason="csrc/kernels is not built")
def test_other_kernels_may_go_on_and_are_told(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(config, "--train.steps", 2, "--kernels", "reference").returncode == 0
    assert read_state(resolve_checkpoint(run)).settings["kernels"] == "reference"
    done = train(config, "--train.steps", 4)
    assert "changed from step 3 on: kernels reference -> native\n" in done.stdout
    done = train(config, "--train.steps", 6)
    assert "kernels" not in "".join(line for line in done.stdout.splitlines() if line.startswith("changed"))
    assert read_state(resolve_checkpoint(run)).settings["kernels"] == "native"
