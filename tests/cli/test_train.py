"""The training command as users run it: resume after kill -9, signals, bad input, a full disk."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatron_med.kernels.linear import has_bf16_products
from tests.cli.processes import (
    TIMEOUT,
    TRAIN,
    environment,
    kill_all,
    kill_group,
    python,
    python_path,
    read_metrics,
    real_python,
    started,
    started_forked,
    started_ranks,
    torchrun_command,
    train,
    train_on_ranks,
    wait_for_step,
    write_config,
)


@pytest.fixture
def config(tmp_path: Path, sample_data: Path) -> Path:
    """A small Llama on the quickstart corpus."""
    model = {"preset": "llama-tiny", "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 176, "vocab_size": 512}
    return write_config(
        tmp_path,
        sample_data,
        model=model,
        data={"sequence_length": 32, "valid": [{"path": str(sample_data)}]},
        train={"steps": 40},
        optimizer={"lr": 1e-3},
        lr_schedule={"warmup_steps": 4, "decay_steps": 40, "min_lr": 1e-4},
        checkpoint={"interval": 20, "keep": 2},
    )


def _losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run)}


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)])
def launched(request: pytest.FixtureRequest) -> dict[str, str] | None:
    """By torchrun, with what it needs of the environment, or (None) each rank by itself."""
    return request.getfixturevalue("forked_ranks") if request.param else None


def _kill_at(step: int, run: Path, launched: dict[str, str] | None, ranks: int, *arguments: object) -> None:
    """kill -9 on the launcher and every rank of a run, once it has reached a step."""
    log = run.with_suffix(".log")
    if launched is not None:
        with started(torchrun_command(ranks, *TRAIN, *arguments), log, launched) as process:
            wait_for_step(run, step, process, log)
            kill_group(process)
        return
    with started_ranks(range(ranks), ranks, *TRAIN, *arguments) as processes:
        wait_for_step(run, step, processes[0], processes[0].output)
        kill_all(processes)


def _finish(launched: dict[str, str] | None, ranks: int, *arguments: object) -> None:
    if launched is None:
        train_on_ranks(ranks, *arguments)
        return
    command = torchrun_command(ranks, *TRAIN, *arguments)
    env = environment() | launched
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_resume_on_other_topology_continues_the_loss_curve(
    config: Path, tmp_path: Path, launched: dict[str, str] | None
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    validating = ("--train.valid_interval", 10, "--train.valid_samples", 21)
    done = train(config, "--train.output_dir", whole, *validating)
    assert done.returncode == 0, done.stderr

    grid = ("--parallel.tensor", 2, "--parallel.pipeline", 2)
    _kill_at(23, broken, launched, 4, config, "--train.output_dir", broken, *validating, *grid)
    assert (broken / "checkpoints" / "latest").read_text().strip() == "step-00000020"
    assert 23 <= read_metrics(broken)[-1]["step"] < 40

    other = ("--parallel.tensor", 1, "--parallel.pipeline", 2, "--parallel.schedule", "gpipe")
    _finish(launched, 4, config, "--train.output_dir", broken, *validating, *other)
    metrics = read_metrics(broken)
    assert [line["step"] for line in metrics] == list(range(1, 41)), "every step once"
    assert [line["consumed_samples"] for line in metrics] == [8 * step for step in range(1, 41)]
    expected, actual = _losses(whole), _losses(broken)
    assert expected[40] < expected[1] - 0.5
    np.testing.assert_allclose([actual[s] for s in range(1, 41)], [expected[s] for s in range(1, 41)], rtol=1e-5)
    valid = {run: [line["valid_loss"] for line in read_metrics(run) if "valid_loss" in line] for run in (whole, broken)}
    assert len(valid[whole]) == 4
    np.testing.assert_allclose(valid[broken], valid[whole], rtol=1e-5)
    assert json.loads((broken / "exit.json").read_text())["code"] == 0
    assert sorted(path.name for path in (broken / "checkpoints").glob("step-*")) == ["step-00000020", "step-00000040"]


def test_killed_before_its_first_checkpoint_it_starts_again_from_step_0(
    config: Path, tmp_path: Path, launched: dict[str, str] | None
) -> None:
    run = tmp_path / "run"
    arguments = (config, "--parallel.pipeline", 2)
    _kill_at(3, run, launched, 2, *arguments)
    first = _losses(run)
    _finish(launched, 2, *arguments, "--train.steps", 6)
    metrics = read_metrics(run)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert {step: _losses(run)[step] for step in (1, 2, 3)} == {step: first[step] for step in (1, 2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_the_launcher_saves_and_ends_with_75(
    config: Path, tmp_path: Path, forked_ranks: dict[str, str], number: signal.Signals
) -> None:
    run = tmp_path / "run"
    arguments = (*TRAIN, config, "--parallel.tensor", 2, "--train.steps", 2000, "--checkpoint.interval", 5000)
    with started(torchrun_command(2, *arguments), tmp_path / "log", forked_ranks) as process:
        wait_for_step(run, 3, process, tmp_path / "log")
        process.send_signal(number)
        process.wait(timeout=60)
    record = json.loads((run / "exit.json").read_text())
    assert record["code"] == 75, (tmp_path / "log").read_text()[-2000:]
    saved = read_metrics(run)[-1]["step"]
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{saved:08d}"
    done = train(config, "--train.steps", saved + 2)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(run)] == list(range(1, saved + 3))


def test_one_rank_ends_with_the_code_itself(config: Path, tmp_path: Path) -> None:
    command = [python_path(), *map(str, (*TRAIN, config, "--train.steps", 5000))]
    with started(command, tmp_path / "log") as process:
        wait_for_step(tmp_path / "run", 2, process, tmp_path / "log")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75


def _refused(done: subprocess.CompletedProcess[str], *messages: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for message in messages:
        assert any(message in line for line in lines), done.stderr


def test_bad_configuration_ends_with_2_and_is_recorded(config: Path, tmp_path: Path) -> None:
    arguments = ("--train.step", 3, "--parallel.schedule", "zero_bubble", "--optimizer.lr", "fast")
    _refused(train(config, *arguments), "did you mean train.steps?", "optimizer.lr is 'fast'")
    record = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert record["code"] == 2
    assert "train.steps" in record["reason"]


def test_world_size_that_does_not_divide_is_told_once_by_rank_0(config: Path) -> None:
    command = torchrun_command(3, *TRAIN, config, "--parallel.tensor", 2)
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode != 0
    assert done.stderr.count("The world size is 3") == 1
    assert "These world sizes would: 2, 4, 6" in done.stderr


def test_missing_data_and_tokenizer_mismatch(config: Path, tmp_path: Path) -> None:
    done = train(config, "--data.train", f"[{{path: {tmp_path}/absent}}, {{path: {tmp_path}/gone}}]")
    _refused(done, f"There is no {tmp_path}/absent.idx", f"There is no {tmp_path}/gone.idx")
    _refused(train(config, "--model.vocab_size", 500), "set model.vocab_size: 512")
    groups = ("--optimizer.groups", "[{match: 'embeding.*', lr_scale: 0.5}]")
    _refused(train(config, *groups), "embeding.* matches no parameter")
    absent = tmp_path / "no checkpoint"
    _refused(train(config, "--checkpoint.load", absent), f"There is no checkpoint at {absent}")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_run_folder_keeps_its_model_data_and_owner(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = (config, "--train.steps", 2)
    assert train(*arguments).returncode == 0
    before = (run / "metrics.jsonl").read_bytes()
    _refused(train(*arguments, "--model.num_layers", 3), "model.num_layers is 3, but")
    _refused(train(*arguments, "--data.sequence_length", 16), "data.sequence_length is 16, but")
    _refused(train(*arguments, "--train.seed", 4), "train.seed is 4, but")
    assert (run / "metrics.jsonl").read_bytes() == before

    with started_forked([*map(str, (*TRAIN, config, "--train.steps", 5000))]) as process:
        wait_for_step(run, 4, process, process.output)
        assert not (run / "exit.json").exists(), "the end of an earlier start says nothing of this one"
        _refused(train(*arguments), "another run is alive in it")
        assert not (run / "exit.json").exists(), "the live run's record is its own"
        assert process.poll() is None


def test_refusal_by_rank_0_ends_every_rank_without_traceback(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(config, "--train.steps", 1).returncode == 0
    before = {name: (run / name).read_bytes() for name in ("config.yaml", "run.json", "metrics.jsonl")}
    command = torchrun_command(2, *TRAIN, config, "--parallel.tensor", 2, "--model.num_layers", 3)
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.stderr.count("error: model.num_layers is 3, but") == 1
    worker_lines = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert not worker_lines, worker_lines
    assert json.loads((run / "exit.json").read_text())["code"] == 2
    assert {name: (run / name).read_bytes() for name in before} == before, "a refused start changes nothing"


def test_a_start_that_failed_does_not_claim_the_folder(config: Path, tmp_path: Path) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    assert train(config, "--train.steps", 1, "--train.output_dir", source).returncode == 0
    wrong = train(config, "--train.steps", 1, "--model.num_layers", 3, "--checkpoint.load", source)
    _refused(wrong, "model.num_layers is 4 in the checkpoint and 3")
    assert json.loads((run / "exit.json").read_text())["code"] == 2
    assert train(config, "--train.steps", 1, "--checkpoint.load", source).returncode == 0
    assert json.loads((run / "exit.json").read_text())["code"] == 0


def test_tokenizer_files_of_any_name_reach_the_exported_folder(config: Path, tmp_path: Path, shared: Path) -> None:
    from tests.conftest import SAMPLE

    tokenizer = shared / "tokenizers" / "llama2_tokenizer.model"
    prefix = tmp_path / "llama2"
    done = python("tools/preprocess_data.py", "--input", SAMPLE, "--output-prefix", prefix, "--tokenizer", tokenizer)
    assert done.returncode == 0, done.stderr
    data = ("--data.train", f"[{{path: {prefix}}}]", "--data.valid", "[]", "--model.vocab_size", 32000)
    assert train(config, "--train.steps", 1, *data).returncode == 0
    run = tmp_path / "run"
    done = real_python("tools/convert_checkpoint.py", "export", "--from", run, "--to", tmp_path / "hf", "--verify")
    assert done.returncode == 0, done.stderr
    done = real_python("tools/generate.py", "--checkpoint", run, "--prompt", "Fever", "--max-new-tokens", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Fever")
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    done = python("tools/convert_checkpoint.py", "export", "--from", run, "--to", run, "--overwrite")
    assert done.returncode == 2
    assert "which is read: name another target" in done.stderr
    assert (run / "checkpoints" / "latest").exists()
    for options, message in (
        (("--prompt", "x", "--top-p", 0, "--temperature", -1), "top-p is 0.0"),
        (("--prompt-ids", 99999), "vocabulary ends at 31999"),
        (("--prompt", "x", "--top-k", 5), "top-k is 5 and top-p 1.0 with temperature 0"),
        (("--prompt", "x", "--max-new-tokens", -3), "--max-new-tokens is -3: it must be at least 1"),
        (("--prompt", "x", "--max-new-tokens", 5000), "max_position_embeddings"),
    ):
        done = python("tools/generate.py", "--checkpoint", run, *options)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_non_finite_gradients_are_skipped_then_stop_the_run_by_name(config: Path, tmp_path: Path) -> None:
    """A weight that is not a number, written into a checkpoint, makes every gradient so."""
    source, run = tmp_path / "source", tmp_path / "run"
    assert train(config, "--train.steps", 1, "--train.output_dir", source).returncode == 0
    _poison(source / "checkpoints" / "step-00000001", "layers.1.mlp.down.weight")
    done = train(config, "--checkpoint.load", source, "--train.max_skipped_steps", 3)
    assert done.returncode == 1
    record = json.loads((run / "exit.json").read_text())
    assert record["code"] == 1
    assert "gradients were not finite for 3 steps: the first is of" in record["reason"]
    metrics = read_metrics(run)
    assert [line["skipped"] for line in metrics] == [True, True, True]
    assert metrics[0]["loss"] is None, "NaN is no JSON"
    short = ("--train.output_dir", tmp_path / "short", "--train.steps", 2)
    assert train(config, "--checkpoint.load", source, *short).returncode == 1
    record = json.loads((tmp_path / "short" / "exit.json").read_text())
    assert "no step from 1 to 2 had a finite loss and gradient" in record["reason"]


def test_fp16_finds_its_loss_scale_and_a_resumed_run_keeps_it(config: Path, tmp_path: Path) -> None:
    """Overflows lower the scale; they are skipped and counted, but do not stop the run while lowering helps."""
    fp16 = ("--precision", "fp16", "--optimizer.initial_loss_scale", 2**27, "--optimizer.loss_scale_window", 4)
    whole, broken = ("--train.output_dir", tmp_path / "whole"), ("--train.output_dir", tmp_path / "broken")
    options = (*fp16, "--train.max_skipped_steps", 1, "--optimizer.name", "decoupled_adamw")
    assert train(config, *options, *whole, "--train.steps", 30).returncode == 0
    metrics = read_metrics(tmp_path / "whole")
    skipped = next(place for place, line in enumerate(metrics) if not line["skipped"])
    assert skipped >= 3
    scale, good = 2.0**27, 0
    for line in metrics:
        assert line["loss_scale"] == scale
        good = 0 if line["skipped"] else good + 1
        if line["skipped"]:
            scale /= 2
        elif good == 4:
            scale, good = 2 * scale, 0
    scales = [line["loss_scale"] for line in metrics]
    assert any(after > before for before, after in itertools.pairwise(scales)), "it never grew"
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1

    assert train(config, *options, *broken, "--train.steps", skipped + 4).returncode == 0
    assert train(config, *options, *broken, "--train.steps", 30).returncode == 0
    again = read_metrics(tmp_path / "broken")
    assert [line["loss_scale"] for line in again] == [line["loss_scale"] for line in metrics]
    assert [line["loss"] for line in again] == [line["loss"] for line in metrics]


def test_the_initial_learning_rate_stays_that_of_the_first_start(config: Path, tmp_path: Path) -> None:
    options = ("--optimizer.name", "decoupled_adamw", "--optimizer.weight_decay", 0.01)
    assert train(config, *options, "--train.steps", 2).returncode == 0
    changed = ("--optimizer.lr", 4e-3, "--lr_schedule.name", "constant", "--train.steps", 4)
    assert train(config, *options, *changed).returncode == 0
    for step in (2, 4):
        state = json.loads((tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
        assert state["initial_lr"] == 1e-3


def _poison(step: Path, name: str) -> None:
    """Saves a checkpoint again with one weight that is not a number."""
    import torch

    from megatron_med.checkpoint import folder as folders
    from megatron_med.checkpoint.storage import Reader, write_streaming

    reader = Reader(step)
    tensors = {key: reader.read(key) for key in reader.shapes()}
    tensors[name].view(-1)[0] = float("nan")
    state = folders.read_state(step)
    partial = folders.begin(step)
    specs = {key: (tuple(tensor.shape), torch.float32) for key, tensor in tensors.items()}
    write_streaming(partial, specs, {key: (lambda key=key: tensors[key]) for key in tensors})
    folders.write_state(partial, state)
    folders.commit(step, folders.describe_files(partial, folders.file_names(partial)))


def test_weights_of_another_run_start_a_fresh_one(config: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    assert train(config, "--train.steps", 20, "--train.output_dir", source).returncode == 0
    trained = _losses(source)[20]
    fresh = ("--train.steps", 3, "--checkpoint.load", source, "--train.output_dir")
    assert train(config, *fresh, tmp_path / "weights").returncode == 0
    weights = read_metrics(tmp_path / "weights")
    assert weights[0]["step"] == 1
    assert weights[0]["loss"] < trained + 0.4
    everything = ("--checkpoint.load", source, "--checkpoint.load_state", "all", "--train.steps", 22)
    done = train(config, *everything, "--train.output_dir", tmp_path / "all")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "all")] == [21, 22]
    other = ("--model.ffn_hidden_size", 128, "--checkpoint.load", source, "--train.output_dir", tmp_path / "x")
    _refused(train(config, *other), "model.ffn_hidden_size is 176 in the checkpoint and 128")


_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
from megatron_med.train.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_full_disk_while_saving_keeps_the_last_good_checkpoint(config: Path, tmp_path: Path) -> None:
    """The system refuses files past 300 kB, as a full disk refuses them."""
    run = tmp_path / "run"
    assert train(config, "--train.steps", 2).returncode == 0
    done = python("-c", _LIMITED, config, "--train.steps", 4)
    _refused(done, "step-00000004 could not be written", "The last good checkpoint stays: step-00000002")
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-00000002"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000002"]
    assert train(config, "--train.steps", 4).returncode == 0
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]


def test_damaged_checkpoint_is_named_and_stepped_back_from(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for steps in (2, 4):
        assert train(config, "--train.steps", steps).returncode == 0
    losses = _losses(run)
    (data,) = (run / "checkpoints" / "step-00000004").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-10])
    done = train(config, "--train.steps", 6)
    assert done.returncode == 0, done.stderr
    assert "step-00000004 is damaged: __0_0.distcp has" in done.stderr
    assert "warning: step-00000004 was set aside; going on from" in done.stderr
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert {step: _losses(run)[step] for step in losses} == losses
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"latest", "step-00000002", "step-00000004.damaged", "step-00000006"}


def test_metrics_and_validation_are_reported(config: Path, tmp_path: Path) -> None:
    arguments = ("--train.steps", 6, "--train.valid_interval", 3, "--train.valid_samples", 10)
    done = train(config, *arguments, "--logging.tensorboard", "true", "--precision", "bf16")
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(tmp_path / "run")
    assert [line["step"] for line in metrics if "valid_loss" in line] == [3, 6]
    names = {"loss", "lr", "grad_norm", "tokens_per_second", "tflops_per_device", "mfu", "memory_bytes", "eta_seconds"}
    assert names <= metrics[0].keys()
    assert {f"{phase}_seconds" for phase in ("data", "forward_backward", "communication", "optimizer")} <= metrics[
        0
    ].keys()
    assert metrics[0]["lr"] == pytest.approx(1e-3 / 4)
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert "valid loss" in done.stdout
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["precision"] == "bf16"
    assert ("bf16 products are emulated here" in done.stdout) is not has_bf16_products(torch.device("cpu"))


def test_going_back_to_an_older_step_keeps_the_newer_ones(config: Path, tmp_path: Path) -> None:
    """As docs/faults.md tells: the name of a step into ``latest``, and the same command."""
    checkpoints = tmp_path / "run" / "checkpoints"
    options = ("--checkpoint.interval", 1, "--checkpoint.keep", 2)
    assert train(config, *options, "--train.steps", 3).returncode == 0
    (checkpoints / "latest").write_text("step-00000002\n")
    done = train(config, *options, "--train.steps", 4)
    assert done.returncode == 0, done.stderr
    aside = checkpoints / "step-00000003.newer"
    assert f"warning: going on from step 2, a later checkpoint was set aside as {aside}." in done.stderr
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000003", aside.name, "step-00000004"]


@pytest.mark.parametrize("lost", ["removed", "not mounted"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew_in_silence(
    config: Path, tmp_path: Path, lost: str
) -> None:
    run = tmp_path / "run"
    if lost == "not mounted":
        (tmp_path / "disk").mkdir()
        run.mkdir()
        (run / "checkpoints").symlink_to(tmp_path / "disk")
    assert train(config, "--train.steps", 2).returncode == 0
    metrics = (run / "metrics.jsonl").read_text()
    if lost == "not mounted":
        (tmp_path / "disk").rename(tmp_path / "elsewhere")
        message = f"checkpoints is a link to {tmp_path / 'disk'}, which is not there. Mount its disk"
    else:
        shutil.rmtree(run / "checkpoints")
        message = "checkpoints holds no checkpoint, and"
    _refused(train(config, "--train.steps", 4), message)
    assert (run / "metrics.jsonl").read_text() == metrics
    if lost == "removed":
        (run / "committed.json").unlink()  # what the message says
        assert train(config, "--train.steps", 1).returncode == 0
        assert [line["step"] for line in read_metrics(run)] == [1]
