"""The sbatch scripts of the recipes under a real Slurm, at toy size."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.cli.local_slurm import Job, LocalSlurm, local_slurm, why_not
from tests.cli.processes import python_path, read_metrics, wait_for_step
from tests.conftest import REPOSITORY

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"no Slurm: {why_not()}"),
    pytest.mark.slow,
]

STEPS = 60
TOY = {
    "model.preset": "gpt2-tiny",
    "model.vocab_size": 512,
    "parallel.tensor": 2,
    "parallel.pipeline": 2,
    "data.sequence_length": 64,
    "data.valid": "[]",
    "train.steps": STEPS,
    "train.micro_batch_size": 1,
    "train.global_batch_size": 8,
    "train.valid_interval": 0,
    "lr_schedule.warmup_steps": 5,
    "checkpoint.load": "null",
    "checkpoint.interval": 1000,
    "logging.tensorboard": "false",
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    with local_slurm(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture
def submit(slurm: LocalSlurm, forked_environment: dict[str, str], tmp_path: Path) -> Callable[..., Job]:
    """Submits the recipe; its launcher is the real one, its ranks are forked."""
    python = {"MEGATRON_MED_PYTHON": python_path(), "PYTHON_EXEC": forked_environment["PYTHON_EXEC"]}
    return partial(_submit, slurm, python, tmp_path / "job.log")


def _submit(
    slurm: LocalSlurm, python: dict[str, str], log: Path, *arguments: str, nodes: int = 2, processes: int = 2
) -> Job:
    """The recipe's own script, on nodes without GPUs."""
    smaller = [f"--nodes={nodes}", "--gpus-per-node=0", "--cpus-per-task=1", "--time=60", f"--output={log}"]
    env = python | {"MEGATRON_MED_PROCESSES": str(processes), "MEGATRON_MED_SRUN": "--label"}
    command = ("sbatch", "--parsable", f"--chdir={REPOSITORY}", *smaller, "examples/gap_replay/70b.sbatch")
    return Job(slurm, slurm.run(*command, *arguments, env=env))


def _toy(prefix: Path, run: Path) -> list[str]:
    given = TOY | {"data.train": f"[{{path: {prefix}}}]", "train.output_dir": run}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_a_warned_job_saves_is_requeued_and_finishes(
    slurm: LocalSlurm, submit: Callable[..., Job], sample_data: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "job.log"
    job = submit(*_toy(sample_data, run))
    wait_for_step(run, 5, job, log)
    slurm.run(
        "scancel", "--batch", "--signal=USR1", job.number
    )  # what --signal=B:USR1@600 does ten minutes before the end
    ended = job.wait()
    output = log.read_text()
    assert ended["JobState"] == "COMPLETED", output[-3000:]
    assert ended["Restarts"] == "1"
    assert "goes back into the queue" in output
    assert [line["step"] for line in read_metrics(run)] == list(range(1, STEPS + 1))
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    # which node gets rank 0, whose lines these are, is torchrun's choice
    assert re.search(r"^[01]: step", output, re.MULTILINE), "MEGATRON_MED_SRUN did not reach srun"
    assert "loaded" in output, "the second start did not go on from the first one's checkpoint"


def test_a_cancelled_job_does_not_come_back(
    slurm: LocalSlurm, submit: Callable[..., Job], sample_data: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "job.log"
    job = submit(*_toy(sample_data, run))
    wait_for_step(run, 3, job, log)
    slurm.run("scancel", job.number)
    ended = job.wait()
    time.sleep(10)  # a requeued job is pending again within seconds
    assert job.poll() == ended["JobState"] == "CANCELLED"
    assert ended["Restarts"] == "0"


def test_a_bad_configuration_ends_the_job_at_once(
    submit: Callable[..., Job], sample_data: Path, tmp_path: Path
) -> None:
    log = tmp_path / "job.log"
    job = submit(*_toy(sample_data, tmp_path / "run"), "--parallel.tensor", "3")
    ended = job.wait()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), log.read_text()
    assert "parallel.tensor is 3" in log.read_text()


def test_without_gpus_the_script_says_what_to_ask_for(submit: Callable[..., Job], tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    ended = submit(nodes=1, processes=0).wait()
    assert ended["ExitCode"] == "2:0"
    assert "--gpus-per-node" in log.read_text()


def test_a_corpus_is_built_by_jobs_behind_each_other(slurm: LocalSlurm, tmp_path: Path) -> None:
    """Every stage is an array of jobs that waits for the one before; the last writes the manifest."""
    pytest.importorskip("datatrove", reason="the corpus extra is not installed")
    for number, text in enumerate(("Aspirin lowers fever in adults.", "Statins lower cholesterol in most patients.")):
        record = {"id": str(number), "title": "On drugs", "raw_text": text}
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(record) + "\n")
    options = {"partition": "test", "time": "00:05:00", "mem_per_cpu_gb": 1, "requeue": False}
    recipe = {
        "output": str(tmp_path / "out"),
        "sources": {"guidelines": {"kind": "guidelines", "input": [f"{tmp_path}/*.jsonl"], "license": "CC0"}},
        "quality": {"near_duplicates": False},
        "execution": {"kind": "slurm", "workers": 2, "options": options},
    }
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump(recipe))
    command = [python_path(), str(REPOSITORY / "tools" / "build_corpus.py"), "corpus.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, env=slurm.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "extract-guidelines: 2 of 2 tasks queued" in done.stdout
    manifest, deadline = tmp_path / "out" / "manifest.json", time.monotonic() + 150
    while not manifest.exists():
        logs = sorted((tmp_path / "out").rglob("*.out"))
        assert time.monotonic() < deadline, [slurm.run("squeue"), *(log.read_text()[-600:] for log in logs[-3:])]
        time.sleep(0.5)
    assert sum(shard["documents"] for shard in json.loads(manifest.read_text())["shards"]) == 2
    while slurm.run("squeue", "-h"):
        assert time.monotonic() < deadline, "jobs are left over"
        time.sleep(0.5)
