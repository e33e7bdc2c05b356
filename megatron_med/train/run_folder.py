"""Everything a run writes is below one folder; this file owns it."""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from megatron_med.checkpoint.folder import (
    CHECKPOINTS,
    complete_steps,
    named_by_latest,
    remove_partials,
    set_aside,
    set_newer_aside,
    step_folder,
)
from megatron_med.errors import CheckpointError, ConfigError
from megatron_med.files import RUN_IDENTITY, remove_leftovers, write_json, write_text
from megatron_med.launch.torchrun import EXIT_FILE

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
EXIT = "exit.json"
COMMITTED = "committed.json"
CONFIG = "config.yaml"
CONFIG_BEFORE = "config.first.yaml"
"""The configuration of the run's first start; checkpoints of older versions do not tell it."""
LOCK = ".lock"
"""Held as long as a run is alive; says which process of which host holds it, and since when."""


class RunFolder:
    """RUN: checkpoints, metrics, the resolved configuration and the reason of the last exit.

    Args:
        path: ``train.output_dir``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / CHECKPOINTS
        self.metrics = self.path / METRICS
        self.samples = self.path / SAMPLES
        self.tensorboard = self.path / "tensorboard"
        self.wandb_id = self.path / "wandb_id"
        self._lock: FileLock | None = None

    def claim(self) -> None:
        """Holds the folder as long as this process lives; the system lets go of it when the process is killed.

        Raises:
            ConfigError: another run is alive in it, or it cannot be made.
        """
        if self._lock is not None:
            return
        if self.path.is_symlink() and not self.path.exists():
            raise ConfigError(
                f"train.output_dir is {self.path}: a link to {os.readlink(self.path)}, which is not there. Mount its "
                "disk, or name another folder."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK, timeout=0)
            lock.acquire()
            (self.path / LOCK).write_text(_describe_self(), encoding="utf-8")
        except Timeout as error:
            holder = _first_line(self.path / LOCK)
            raise ConfigError(
                f"train.output_dir is {self.path}: another run is alive in it{f' ({holder})' if holder else ''}. Wait "
                "for it, stop it, or name another folder."
            ) from error
        except OSError as error:
            raise ConfigError(f"train.output_dir is {self.path}: it cannot be written ({error.strerror}).") from error
        self._lock = lock

    @property
    def claimed(self) -> bool:
        return self._lock is not None

    def release(self) -> None:
        """Lets go of the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Refuses a folder that holds a run of another model or other data. Writes nothing.

        Raises:
            ConfigError: one fault for each field that differs.
        """
        path = self.path / RUN_IDENTITY
        if not path.is_file():
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(
                f"{path} cannot be read ({error}): it says which model and data this folder belongs to. Name another "
                "train.output_dir, or remove the file if you are sure that model and data are the same."
            ) from error
        before, now = _flat(stored), _flat(json.loads(json.dumps(identity)))
        faults = [
            f"{name} is {now.get(name)!r}, but {self.path} holds a run with {before.get(name)!r}: "
            "name another train.output_dir, or go on with the same model and data."
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
            and not name.endswith(".path")
            and (name in before or now[name])  # a switch that came later, and is off, changes nothing
        ]
        if faults:
            raise ConfigError(faults)

    def begin(self, identity: dict[str, Any], config: str, step: int) -> None:
        """Records a start from ``step`` that everything has agreed to; what an earlier end or crash left behind goes.
        Checkpoints of later steps are set aside."""
        if (self.path / CONFIG).is_file() and not (self.path / CONFIG_BEFORE).is_file():
            write_text(self.path / CONFIG_BEFORE, (self.path / CONFIG).read_text(encoding="utf-8"))
        self.write_json(RUN_IDENTITY, identity)
        write_text(self.path / CONFIG, config)
        (self.path / EXIT).unlink(missing_ok=True)
        remove_partials(self.checkpoints)
        for aside in set_newer_aside(self.checkpoints, step):
            print(f"warning: going on from step {step}, a later checkpoint was set aside as {aside}.", file=sys.stderr)
        for name in (RUN_IDENTITY, CONFIG, CONFIG_BEFORE, EXIT, COMMITTED, METRICS, SAMPLES):
            remove_leftovers(self.path, name)
        remove_leftovers(self.checkpoints)
        if step > 0 and not (self.path / COMMITTED).is_file():  # of a version that did not record it
            self.record_commit(step)

    def resume_point(self) -> Path | None:
        """The step that ``latest`` names, whole or not; None where the run has no checkpoint yet.

        Raises:
            ConfigError: there should be one, and it cannot be found.
        """
        if self.checkpoints.is_symlink() and not self.checkpoints.exists():
            raise ConfigError(
                f"{self.checkpoints} is a link to {os.readlink(self.checkpoints)}, which is not there. Mount its disk, "
                "or remove the link."
            )
        steps = complete_steps(self.checkpoints)
        folder = named_by_latest(self.checkpoints)
        witness = next((self.path / name for name in (COMMITTED, EXIT) if self._tells_of_a_save(name)), None)
        if folder is None and len(steps) == 1 and witness is None:
            return step_folder(self.checkpoints, steps[0])  # killed in its first save, just before 'latest' was written
        if folder is None and steps:
            raise ConfigError(
                f"{self.checkpoints} holds steps {steps} but no file 'latest': write the name of the step to go on "
                "from into it."
            )
        if folder is None and witness is not None:
            raise ConfigError(
                f"{self.checkpoints} holds no checkpoint, and {witness} says that this run has saved some. Bring them "
                f"back, or mount their disk. To begin anew, name another train.output_dir, or remove {witness}: "
                "metrics.jsonl then begins at step 1, too."
            )
        return folder

    def _tells_of_a_save(self, name: str) -> bool:
        """Whether a file of the run says that a checkpoint was made: a run that has ended well has one."""
        path = self.path / name
        if name == COMMITTED or not path.is_file():
            return path.is_file()
        with suppress(ValueError, TypeError, KeyError):
            record = json.loads(path.read_text(encoding="utf-8"))
            return record["code"] == 0 or str(record["reason"]).startswith("saved step")
        return False

    def record_commit(self, step: int) -> None:
        """Remembers that a step was saved: without it, checkpoints that are gone would look like a run that is new."""
        try:
            self.write_json(COMMITTED, {"step": step})
        except OSError as error:  # the checkpoint itself is safe
            print(f"warning: {self.path / COMMITTED} could not be written: {error}", file=sys.stderr, flush=True)

    def step_back(self, damaged: Path, fault: CheckpointError) -> Path:
        """Sets a damaged step aside and returns the whole one before it.

        Raises:
            CheckpointError: ``fault``, where there is none.
        """
        previous = set_aside(damaged)
        if previous is None:
            raise fault
        print(f"warning: {fault}", file=sys.stderr)
        print(f"warning: {damaged.name} was set aside; going on from {previous}.", file=sys.stderr, flush=True)
        return previous

    def cut_metrics(self, step: int) -> None:
        """Removes the lines of steps after ``step``, of metrics and of samples: they will be run again."""
        for path in (self.metrics, self.samples):
            if path.is_file():
                _cut_lines(path, step)

    def write_exit(self, code: int, reason: str, retry: bool | None = None) -> None:
        """Records how the run ended, for launch scripts: torchrun itself answers 1 for every failure.

        Args:
            code: exit code.
            reason: in words.
            retry: whether to start the same command again: false where a failure would only come again, true where
                nobody has asked for the end. None: as the code says.
        """
        write_launch_record(code, reason, retry)
        try:
            self.write_json(EXIT, _exit_record(code, reason, retry))
        except OSError as error:  # a full disk must not hide the reason itself
            print(f"error: {self.path / EXIT} could not be written: {error}", file=sys.stderr, flush=True)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes a small file in one piece."""
        write_json(self.path / name, content)


def write_launch_record(code: int, reason: str, retry: bool | None = None) -> None:
    """The same record for the launch script of this start alone, where MEGATRON_MED_EXIT_FILE names a file: a start
    that is refused because another run is alive in RUN must not write there."""
    path = os.environ.get(EXIT_FILE)
    if path:
        with suppress(OSError):
            Path(path).write_text(json.dumps(_exit_record(code, reason, retry)), encoding="utf-8")


def _cut_lines(path: Path, step: int) -> None:
    kept = []
    for line in path.read_bytes().split(b"\n"):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.decode())
        except (ValueError, KeyError, TypeError):
            continue  # a line that a crash cut in half
    write_text(path, "".join(f"{line}\n" for line in kept))


def _exit_record(code: int, reason: str, retry: bool | None) -> dict[str, Any]:
    record: dict[str, Any] = {"code": code, "reason": reason}
    return record if retry is None else record | {"retry": retry}


def _describe_self() -> str:
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()}, since {now}\n"


def _first_line(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8").partition("\n")[0].strip()
    return ""


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
