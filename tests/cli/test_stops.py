"""Whoever asks a run to stop finds it saved: a signal at any time, and a launcher that is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_med.train.signals import LAUNCHER_GONE, StopRequest
from tests.cli.processes import (
    TRAIN,
    descendants,
    python_path,
    read_metrics,
    started,
    started_forked,
    started_ranks,
    torchrun_command,
    train,
    wait_for_step,
    write_dropout_config,
)
from tests.conftest import REPOSITORY
from tests.ranks import free_port


@pytest.fixture
def config(tmp_path: Path, sample_data: Path) -> Path:
    return write_dropout_config(tmp_path, sample_data, interval=5000, steps=5000)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_every_signal_saves(config: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [*TRAIN, str(config), "--parallel.pipeline", "1"]
    with started_forked(command) as process:
        wait_for_step(tmp_path / "run", 2, process, process.output)
        os.kill(process.pid, number)
        assert process.wait(60) == 75
        assert f"{number.name} came: the run saves after this step" in process.output()
    _assert_saved(tmp_path / "run", {"code": 75}, number.name)


def test_a_second_ctrl_c_ends_a_run_without_a_launcher(config: Path, tmp_path: Path) -> None:
    command = [*TRAIN, str(config), "--parallel.pipeline", "1", "--train.global_batch_size", "4096"]
    with started_forked(command) as process:
        _await(lambda: "kernels: " in process.output())
        time.sleep(1)  # the first step has begun
        os.kill(process.pid, signal.SIGINT)
        _await(lambda: "Ctrl-C again ends it without a save" in process.output())
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) == 1
        assert "error: ended without a save by a second Ctrl-C" in process.output()
        assert "Traceback" not in process.output()


def test_a_signal_before_all_ranks_have_come_ends_those_that_wait(config: Path, tmp_path: Path) -> None:
    """Rank 2 of 3 never comes, and rank 0 alone is signalled."""
    with started_ranks(
        (0, 1), 3, *TRAIN, config, "--parallel.pipeline", 1, "--train.global_batch_size", 12
    ) as processes:
        time.sleep(3)
        os.kill(processes[0].pid, signal.SIGINT)
        assert [process.wait(20) for process in processes] == [75, 75]
        assert not any("Traceback" in process.output() for process in processes)
    record = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert record == {"code": 75, "reason": "stopped before all ranks had come (SIGINT); start again to go on"}


def test_a_rank_that_dies_while_others_start_up_ends_no_launch_script(config: Path, tmp_path: Path) -> None:
    """torchrun sends SIGTERM to the other ranks: to them it looks as if somebody wanted an end."""
    run, log = tmp_path / "run", tmp_path / "log"
    script = ["bash", str(REPOSITORY / "tools" / "launch.sh"), "--standalone", "--nproc-per-node", "2", "--"]
    quick = {"MEGATRON_MED_RESTART_DELAY": "0", "MEGATRON_MED_PYTHON": python_path()}
    with started([*script, str(config), "--train.timeout_minutes", "1"], log, quick) as process:
        _await(lambda: len(_listening_ranks(process.pid)) == 2)
        os.kill(_listening_ranks(process.pid)[1], signal.SIGKILL)
        wait_for_step(run, 1, process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
    assert log.read_text().count("starting again") == 1


def _listening_ranks(launcher: int) -> list[int]:
    """Ranks below a launcher that have taken over SIGUSR1."""
    found = []
    for pid in descendants(launcher):
        status = _read(Path(f"/proc/{pid}/status"))
        caught = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt")), 0)
        if "megatron_med.train" in _command(pid) and "distributed.run" not in _command(pid) and caught >> 9 & 1:
            found.append(pid)
    return found


def test_the_launcher_is_gone_when_the_parent_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when it is process 1, as in a container."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    stop = StopRequest()
    assert not stop.asked
    monkeypatch.setattr(os, "getppid", lambda: 7)
    assert stop.asked
    assert stop.reason == LAUNCHER_GONE
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    alone = StopRequest()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert not alone.asked, "without torchrun a parent may end"


def test_a_rank_that_waits_for_rank_0_obeys_a_signal(config: Path) -> None:
    with started_ranks((1,), 2, *TRAIN, config) as (process,):
        time.sleep(3)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 75
        assert "Traceback" not in process.output()


def test_ctrl_c_on_torchrun_saves(config: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with started(torchrun_command(2, *TRAIN, config), log) as process:
        wait_for_step(run, 3, process, log)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    _assert_saved(run, {"code": 75}, "SIGINT")


def test_ranks_save_when_their_launcher_is_killed(config: Path, tmp_path: Path) -> None:
    """torchrun's store goes with it. Meanwhile another start says which process is alive, and where."""
    run, log = tmp_path / "run", tmp_path / "log"
    with started(torchrun_command(2, *TRAIN, config, "--train.global_batch_size", 256), log) as process:
        wait_for_step(run, 2, process, log)
        ranks = [pid for pid in descendants(process.pid) if "megatron_med.train" in _command(pid)]
        try:
            process.kill()
            process.wait(timeout=10)
            lock = (run / ".lock").read_text()
            assert f"on {socket.gethostname()}, since 20" in lock
            assert any(f"process {rank} " in lock for rank in ranks)
            _await(lambda: not any(map(_command, ranks)))
        finally:
            for rank in ranks:
                with suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
    _assert_saved(run, {"code": 75, "retry": True}, "the launcher is gone")
    assert "Traceback" not in log.read_text()
    step = read_metrics(run)[-1]["step"]
    done = train(config, "--parallel.pipeline", 1, "--train.steps", step + 1)
    assert done.returncode == 0, done.stderr


def test_a_run_that_is_alive_is_named(config: Path, tmp_path: Path) -> None:
    with started_forked([*TRAIN, str(config), "--parallel.pipeline", "1"]) as process:
        wait_for_step(tmp_path / "run", 1, process, process.output)
        done = train(config, "--parallel.pipeline", 1)
        assert done.returncode == 2
        assert f"another run is alive in it (process {process.pid} on {socket.gethostname()}, since 20" in done.stderr


def test_a_refusal_reaches_the_launch_script_of_every_host(config: Path, tmp_path: Path) -> None:
    """A host without rank 0, whose RUN is a disk of its own."""
    record = tmp_path / "exit"
    env = {"RANK": "1", "WORLD_SIZE": "2", "MEGATRON_MED_EXIT_FILE": str(record)}
    with started_forked([*TRAIN, str(config), "--train.step", "3"], env) as process:
        _await(lambda: record.exists() and bool(record.read_text()))
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(5) == 2
    assert json.loads(record.read_text())["code"] == 2


def test_a_fault_of_the_data_reaches_the_launch_script_of_every_host(config: Path, tmp_path: Path) -> None:
    """All ranks find it together, rank 0 tells it, and each host's script must know that starting again is no use."""
    (tmp_path / "records").mkdir()
    rank_0, rank_1 = (tmp_path / "records" / str(rank) for rank in (0, 1))
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [*TRAIN, str(config), "--model.vocab_size", "500"]
    first, second = (
        common | {"RANK": str(rank), "LOCAL_RANK": "0", "MEGATRON_MED_EXIT_FILE": str(path)}
        for rank, path in ((0, rank_0), (1, rank_1))
    )
    with started_forked(command, first) as one, started_forked(command, second) as other:
        assert [process.wait(60) for process in (one, other)] == [2, 2]
        assert "set model.vocab_size: 512" in one.output()
        assert "error: " not in other.output()
    assert [json.loads(path.read_text())["code"] for path in (rank_0, rank_1)] == [2, 2]


def _assert_saved(run: Path, expected: dict[str, object], why: str) -> None:
    record = json.loads((run / "exit.json").read_text())
    step = read_metrics(run)[-1]["step"]
    assert record == expected | {"reason": f"saved step {step} ({why}); start again to go on"}
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{step:08d}"


def _command(pid: int) -> str:
    return _read(Path(f"/proc/{pid}/cmdline"))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _await(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
