"""Ranks that die, hang or never come: the run ends cleanly, names them, and goes on bitwise as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_med.checkpoint.folder import complete_steps, resolve_checkpoint
from megatron_med.checkpoint.storage import Reader
from tests.cli.processes import (
    TIMEOUT,
    TRAIN,
    descendants,
    environment,
    python_path,
    read_metrics,
    started,
    started_ranks,
    torchrun_command,
    wait_for_step,
    write_dropout_config,
)
from tests.conftest import REPOSITORY

KILLS = 8


@pytest.fixture
def config(tmp_path: Path, sample_data: Path) -> Path:
    return write_dropout_config(tmp_path, sample_data, interval=5, steps=130)


def _workers(launcher: int) -> list[int]:
    """Process ids of the ranks below a launcher."""
    commands = {pid: _command(pid) for pid in descendants(launcher)}
    return [
        pid
        for pid, command in commands.items()
        if b"megatron_med.train" in command and b"torch.distributed.run" not in command
    ]


def _command(pid: int) -> list[bytes]:
    """Words of a process' command; none where it has ended since it was listed."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _launcher(script: int) -> int:
    """Process id of torchrun below ``launch.sh``."""
    return next(pid for pid in descendants(script) if b"torch.distributed.run" in _command(pid))


def _final(run: Path) -> dict[str, np.ndarray]:
    reader = Reader(resolve_checkpoint(run))
    return {name: reader.read(name).numpy() for name in reader.shapes()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_leave_the_final_weights_bitwise_equal(
    config: Path, tmp_path: Path, forked_ranks: dict[str, str]
) -> None:
    """A random rank is killed at random moments: while starting, training, saving. torchrun restarts both."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = torchrun_command(2, *TRAIN, config, "--train.output_dir", whole)
    subprocess.run(
        command, env=environment() | forked_ranks, cwd=REPOSITORY, timeout=TIMEOUT, check=True, capture_output=True
    )

    chance = random.Random(5)
    log = tmp_path / "log"
    options = ("--max-restarts", KILLS + 5, "--monitor-interval", 0.1)
    command = torchrun_command(2, *options, *TRAIN, config, "--train.output_dir", broken)
    kills, ends = 0, []
    with started(command, log, forked_ranks) as process:
        before: set[int] = set()
        while kills < KILLS:
            workers = _await_workers(process, before, log)
            _await_moment(chance, broken, process)
            assert set(workers) <= set(_workers(process.pid)), f"a rank ended by itself:\n{log.read_text()[-3000:]}"
            os.kill(chance.choice(workers), signal.SIGKILL)
            killed_at = time.monotonic()
            _await_gone(workers, process)
            ends.append(time.monotonic() - killed_at)
            before |= set(workers)
            kills += 1
        assert process.wait(timeout=TIMEOUT) == 0, log.read_text()[-3000:]
    assert max(ends) < 20, f"survivors took {max(ends):.1f} s to end"
    assert [line["step"] for line in read_metrics(broken)] == list(range(1, 131))
    assert [line["loss"] for line in read_metrics(broken)] == [line["loss"] for line in read_metrics(whole)]
    expected, actual = _final(whole), _final(broken)
    assert expected.keys() == actual.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(actual[name], values, err_msg=name)
    assert not list((broken / "checkpoints").glob("*.partial"))
    assert not list((broken / "checkpoints").glob("*.damaged")), "no checkpoint was ever half-written"
    assert json.loads((broken / "exit.json").read_text())["code"] == 0


def _await_workers(process: subprocess.Popen[bytes], before: set[int], log: Path) -> list[int]:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        workers = [pid for pid in _workers(process.pid) if pid not in before]
        if len(workers) == 2:
            return workers
        assert process.poll() is None, f"the run ended before it was killed often enough:\n{log.read_text()[-3000:]}"
        time.sleep(0.02)
    raise TimeoutError("torchrun started no new ranks")


def _await_moment(chance: random.Random, run: Path, process: subprocess.Popen[bytes]) -> None:
    """One kill in five falls into the start-up; the others some steps on, and up to 50 ms later."""
    if chance.random() < 0.2:
        time.sleep(chance.uniform(0, 4))
        return
    metrics = read_metrics(run)
    target = (metrics[-1]["step"] if metrics else 0) // 5 * 5 + chance.randint(1, 6)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        metrics = read_metrics(run)
        if metrics and metrics[-1]["step"] >= target:
            break
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.05))


def _await_gone(pids: list[int], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a survivor hangs"
        assert process.poll() is None or not _workers(process.pid)
        time.sleep(0.02)


def test_a_rank_that_hangs_is_named_within_the_timeout(config: Path, tmp_path: Path) -> None:
    """Rank 2 stops answering, as on a host that swaps or a device that hangs."""
    run = tmp_path / "run"
    grid = ("--parallel.pipeline", 2, "--train.timeout_minutes", 0.1, "--train.steps", 100000)
    with started_ranks(range(4), 4, *TRAIN, config, *grid) as processes:
        wait_for_step(run, 3, processes[0], processes[0].output)
        os.kill(processes[2].pid, signal.SIGSTOP)
        stopped = time.monotonic()
        others = [processes[rank] for rank in (0, 1, 3)]
        assert [process.wait(timeout=90) for process in others] == [1, 1, 1]
        seconds = time.monotonic() - stopped
        text = "".join(process.output() for process in others)
    _assert_rank_2_is_named(run, text, seconds)


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_hangs(config: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    grid = ("--parallel.pipeline", 2, "--train.timeout_minutes", 0.1, "--train.steps", 100000)
    command = torchrun_command(4, "--shutdown-timeout", 2, *TRAIN, config, *grid)
    with started(command, log) as process:
        wait_for_step(run, 3, process, log)
        hanging = _workers_by_rank(process.pid)[2]
        os.kill(hanging, signal.SIGSTOP)
        stopped = time.monotonic()
        assert process.wait(timeout=90) == 1
        seconds = time.monotonic() - stopped
    _assert_rank_2_is_named(run, log.read_text(), seconds)


def _assert_rank_2_is_named(run: Path, text: str, seconds: float) -> None:
    assert text.count("error: rank 2 did not answer (train.timeout_minutes is 0:00:06): hangs or has died.") == 1, text
    assert seconds < 45, f"the others took {seconds:.0f} s to end"
    record = json.loads((run / "exit.json").read_text())
    assert record["code"] == 1
    assert record["reason"].startswith("rank 2 did not answer")


def _workers_by_rank(launcher: int) -> dict[int, int]:
    ranks = {}
    for pid in _workers(launcher):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        (rank,) = (int(v.split(b"=")[1]) for v in variables if v.startswith(b"RANK="))
        ranks[rank] = pid
    return ranks


_FAILING = """
import os, sys
from megatron_med.errors import DataError
from megatron_med.train import loop, setup
from megatron_med.train.__main__ import main

def fail(*arguments, **options):
    raise {error}

step = loop.train_step
taken = []
def failing_step(*arguments):
    taken.append(1)
    return fail() if len(taken) == 3 else step(*arguments)

if os.environ["RANK"] == "1":
    if "{where}" == "set-up":
        setup.find_tokenizer = fail
    else:
        loop.train_step = failing_step
sys.exit(main(sys.argv[1:]))
"""


MEMORY = ("MemoryError('no room for 8 GB')", "training", 1, "rank 1: MemoryError: no room for 8 GB")
SAMPLE = ("DataError('x.bin holds the id 600')", "training", 2, "rank 1: x.bin holds the id 600")
DISK = ("DataError('There is no /data/x.idx')", "set-up", 2, "rank 1: There is no /data/x.idx")


@pytest.mark.parametrize(("error", "where", "code", "reason"), [MEMORY, SAMPLE, DISK])
def test_a_fault_of_one_rank_is_recorded_with_its_own_words(
    config: Path, tmp_path: Path, error: str, where: str, code: int, reason: str
) -> None:
    """The healthy ranks are not blamed, and launch scripts see whether to start again."""
    script = tmp_path / "failing.py"
    script.write_text(_FAILING.format(error=error, where=where))
    with started_ranks(range(2), 2, script, config, "--train.steps", 1000) as processes:
        codes = [process.wait(TIMEOUT) for process in processes]
        text = "".join(process.output() for process in processes)
    assert codes == [code, code]
    _assert_recorded(tmp_path / "run", text, code, reason)


@pytest.mark.parametrize(
    ("error", "where", "code", "reason"),
    [MEMORY, pytest.param(*SAMPLE, marks=pytest.mark.slow), pytest.param(*DISK, marks=pytest.mark.slow)],
)
def test_torchrun_ends_every_rank_only_after_the_fault_is_recorded(
    config: Path, tmp_path: Path, forked_ranks: dict[str, str], error: str, where: str, code: int, reason: str
) -> None:
    """It signals the others as soon as one rank is gone."""
    script = tmp_path / "failing.py"
    script.write_text(_FAILING.format(error=error, where=where))
    command = torchrun_command(2, script, config, "--train.steps", 1000)
    env = environment() | forked_ranks
    done = subprocess.run(
        command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 1
    _assert_recorded(tmp_path / "run", done.stderr, code, reason)


def _assert_recorded(run: Path, text: str, code: int, reason: str) -> None:
    assert json.loads((run / "exit.json").read_text()) == {"code": code, "reason": reason}
    assert "did not answer" not in text
    if code == 2:
        assert text.count(f"error: {reason}") == 1


def test_ranks_that_never_come_are_named(config: Path) -> None:
    """Two of three ranks are started, as when a node does not boot."""
    command = (
        *TRAIN,
        config,
        "--train.timeout_minutes",
        0.1,
        "--parallel.pipeline",
        1,
        "--train.global_batch_size",
        12,
    )
    with started_ranks((0, 2), 3, *command) as processes:
        assert [process.wait(120) for process in processes] == [1, 1]
        assert "ranks [1] of 3 did not start within 0:00:06" in processes[0].output()


def test_the_launch_script_starts_again_after_a_kill_and_not_after_bad_input(
    config: Path, tmp_path: Path, forked_ranks: dict[str, str]
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    script = ["bash", str(REPOSITORY / "tools" / "launch.sh"), "--standalone", "--nproc-per-node", "2", "--"]
    quick = {"MEGATRON_MED_RESTART_DELAY": "0", "MEGATRON_MED_PYTHON": python_path()}
    with started(["nohup", *script, str(config), "--train.steps", "80"], log, quick) as process:
        wait_for_step(run, 12, process, log)
        for pid in (process.pid, *descendants(process.pid)):
            os.kill(pid, signal.SIGHUP)  # the terminal is closed
        wait_for_step(run, 16, process, log)
        os.kill(_workers(process.pid)[0], signal.SIGKILL)
        wait_for_step(run, 30, process, log)
        os.kill(_launcher(process.pid), signal.SIGKILL)
        assert process.wait(timeout=120) == 0, log.read_text()[-3000:]
    text = log.read_text()
    assert text.count("launch.sh: torchrun ended with 1; starting again") == 1
    assert text.count("launch.sh: torchrun is gone; waiting for its ranks to save") == 1
    assert text.count("launch.sh: torchrun ended with 137; starting again") == 1
    assert text.count("loaded") == 2
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 81))

    quick |= forked_ranks
    with started([*script, str(config), "--train.steps", "100000"], log, quick) as process:
        wait_for_step(run, 83, process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 75
    assert complete_steps(run / "checkpoints")[-1] == read_metrics(run)[-1]["step"]

    for bad in ([str(config), "--model.num_layers", "3"], [str(tmp_path / "absent.yaml")]):
        done = subprocess.run(
            [*script, *bad], env=environment() | quick, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 2
        assert "error: " in done.stderr
        assert "starting again" not in done.stderr
    script[2] = "--no-such-option-of-torchrun"
    done = subprocess.run(
        [*script, str(config)], env=environment() | quick, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 2


def test_the_launch_script_leaves_a_live_run_alone_and_saves_at_ctrl_c(
    config: Path, tmp_path: Path, forked_ranks: dict[str, str]
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    script = ["bash", str(REPOSITORY / "tools" / "launch.sh"), "--standalone", "--nproc-per-node", "2", "--"]
    quick = {"MEGATRON_MED_RESTART_DELAY": "0", "MEGATRON_MED_PYTHON": python_path()} | forked_ranks
    with started([*script, str(config), "--train.steps", "100000"], log, quick) as process:
        wait_for_step(run, 3, process, log)
        done = subprocess.run(
            [*script, str(config)], env=environment() | quick, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 2
        assert "another run is alive in it" in done.stderr
        assert "starting again" not in done.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 75
    assert complete_steps(run / "checkpoints")[-1] == read_metrics(run)[-1]["step"]
