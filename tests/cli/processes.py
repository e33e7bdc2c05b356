"""Starts the commands of the README as real processes and never leaves one behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml

from tests.cli.forked_python import become
from tests.conftest import REPOSITORY
from tests.ranks import forkserver, free_port

TIMEOUT = 240
TRAIN = ("-m", "megatron_med.train")


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
    tree["train"].setdefault("micro_batch_size", 2 if tree["train"]["global_batch_size"] >= 8 else 1)
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


def real_python(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` in the repository, by an interpreter of its own: where the command line is the point."""
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


def python(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The same of a script, ``-m MODULE`` or ``-c CODE``, forked from a server that has torch and transformers loaded:
    seconds less. Arguments, environment, output, exit code and signals are those of a process of its own; what an
    import brings, and what the interpreter does when it ends, is not shown: ``real_python`` does.
    """
    with started_forked([str(word) for word in arguments], env=env) as process:
        return process.communicate(TIMEOUT)


def train(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The training command on one rank."""
    return python(*TRAIN, *arguments)


class ForkedProcess:
    """A command forked from the server, in a session of its own."""

    def __init__(self, arguments: list[str], env: dict[str, str], folder: Path) -> None:
        self._out, self._err = folder / "out", folder / "err"
        self._out.touch()
        self._err.touch()
        self._process = forkserver.Process(target=_run_command, args=(arguments, env, self._out, self._err))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, "the process was started"
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code; None while it runs; negative where a signal has ended it."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Exit code."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise TimeoutError(f"no end in {timeout} s:\n{self.output()[-3000:]}")
        return code

    def communicate(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Waits for the end; exit code and what was printed."""
        code = self.wait(timeout)
        return subprocess.CompletedProcess([], code, _text(self._out), _text(self._err))

    def output(self) -> str:
        """Everything printed so far."""
        return _text(self._out) + _text(self._err)

    def kill(self) -> None:
        """kill -9 on the process and all that it has started, also where it has ended itself."""
        below = descendants(self.pid) if self.poll() is None else []  # an ended process' number may be another's
        self._process.kill()
        for pid in below:  # torchrun gives each rank a session of its own
            _kill(pid)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join(30)


def kill_all(processes: Sequence[ForkedProcess]) -> None:
    """kill -9 on all of them at once."""
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.kill()


def _text(path: Path) -> str:
    return path.read_text(errors="replace")


@contextmanager
def started_forked(arguments: list[str], env: dict[str, str] | None = None) -> Iterator[ForkedProcess]:
    """``python ARGUMENTS`` in the background; whatever is left of it at the end is killed."""
    with tempfile.TemporaryDirectory() as folder:
        process = ForkedProcess(arguments, environment() | (env or {}), Path(folder))
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def started_ranks(ranks: Sequence[int], world_size: int, *command: object) -> Iterator[list[ForkedProcess]]:
    """These ranks of a run, without a launcher above them."""
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ExitStack() as stack:
        processes = []
        for rank in ranks:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(stack.enter_context(started_forked([str(word) for word in command], common | own)))
        yield processes


def train_on_ranks(world_size: int, *arguments: object) -> None:
    """Trains on so many ranks to the end."""
    with started_ranks(range(world_size), world_size, *TRAIN, *arguments) as processes:
        for process in processes:
            assert process.wait(TIMEOUT) == 0, process.output()[-3000:]


def _run_command(arguments: list[str], env: dict[str, str], out: Path, err: Path) -> None:
    """What the interpreter does with ``arguments``, in a child of the server."""
    os.setsid()
    for path, descriptor in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    become(arguments, REPOSITORY, env)


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
    below = descendants(process.pid)
    _kill(process.pid)
    for child in below:
        _kill(child)
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


def wait_for_step(run: Path, step: int, process: _Process, log: Path | Callable[[], str]) -> None:
    """Returns when metrics.jsonl has reached ``step``. ``log``: where what was printed stands, or what tells it."""
    printed = partial(_text, log) if isinstance(log, Path) else log
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        metrics = read_metrics(run)
        if metrics and metrics[-1]["step"] >= step:
            return
        assert process.poll() is None, f"the run ended early:\n{printed()[-3000:]}"
        time.sleep(0.02)
    raise TimeoutError(f"no step {step} in {TIMEOUT} s:\n{printed()[-3000:]}")
