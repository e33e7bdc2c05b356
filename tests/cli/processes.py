"""Starts the commands of the README as real processes and never leaves one behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import yaml

from tests.conftest import REPOSITORY
from tests.ranks import forkserver

TIMEOUT = 240


def write_config(folder: Path, prefix: Path, **sections: dict[str, Any]) -> Path:
    """``folder/config.yaml``: an fp32 run on a token file that writes to ``folder/run``; sections add to it or win."""
    tree: dict[str, Any] = {
        "data": {"train": [{"path": str(prefix)}]},
        "train": {"global_batch_size": 8, "output_dir": str(folder / "run"), "seed": 3},
        "logging": {"tensorboard": False},
        "precision": "fp32",
    }
    for name, fields in sections.items():
        tree[name] = tree.get(name, {}) | fields
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def write_dropout_config(folder: Path, prefix: Path, interval: int, **train: Any) -> Path:
    """A small GPT-2 with dropout over two stages: masks, order of samples and optimizer state must all come back."""
    return write_config(
        folder,
        prefix,
        model={"preset": "gpt2-tiny", "vocab_size": 512, "hidden_dropout": 0.1},
        data={"sequence_length": 64},
        train=train,
        parallel={"pipeline": 2},
        checkpoint={"interval": interval, "keep": 3},
    )


def environment() -> dict[str, str]:
    """This process' environment without the marks of a launcher."""
    drop = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    return {key: value for key, value in os.environ.items() if key not in drop} | {"OMP_NUM_THREADS": "1"}


def python_path() -> str:
    """The interpreter that the tests run with."""
    return sys.executable


def python(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` in the repository."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment() | (env or {}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def train_forked(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The training command on one rank, forked from a server that has its imports loaded: seconds less than
    ``python -m megatron_med.train`` and the same from its first line on."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = forkserver.Process(target=_train, args=([str(a) for a in arguments], str(out), str(err)))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"no end in {TIMEOUT} s: {err.read_text()[-2000:]}")
        assert process.exitcode is not None, "the process was joined"
        return subprocess.CompletedProcess([], process.exitcode, out.read_text(), err.read_text())


def _train(arguments: list[str], out: str, err: str) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    from megatron_med.train.__main__ import main

    sys.exit(main(arguments))


def torchrun_command(ranks: int, *arguments: object) -> list[str]:
    """``torchrun --nproc-per-node RANKS ...`` with a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launcher += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    return launcher + [str(argument) for argument in arguments]


@contextmanager
def started(command: list[str], log: Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process group in the background; whatever is left of it at the end is killed."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment() | (env or {}),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """kill -9 on the launcher and all ranks."""
    for child in descendants(process.pid):
        _kill(child)
    _kill(process.pid)
    process.wait(timeout=30)


def descendants(pid: int) -> list[int]:
    """Processes below ``pid``: torchrun gives each worker a session of its own."""
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    except OSError:
        pass
    return found


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


class _Process(Protocol):
    """What can be asked whether it has ended: a process, a job of Slurm."""

    def poll(self) -> object: ...


def wait_for_step(run: Path, step: int, process: _Process, log: Path) -> None:
    """Returns when metrics.jsonl has reached ``step``."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        metrics = read_metrics(run)
        if metrics and metrics[-1]["step"] >= step:
            return
        assert process.poll() is None, f"the run ended early:\n{log.read_text()[-3000:]}"
        time.sleep(0.02)
    raise TimeoutError(f"no step {step} in {TIMEOUT} s:\n{log.read_text()[-3000:]}")
