"""Runs the stages of a build with datatrove's executors: processes of this machine, Slurm, Ray."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from loguru import logger

from megatron_med.corpus.recipe import Execution
from megatron_med.errors import ConfigError, DataError


@dataclass(frozen=True)
class Stage:
    """One pipeline, run by so many tasks.

    Attributes:
        name: of its folder of logs, statistics and completion marks.
        pipeline: datatrove blocks, and functions ``(data, rank, world_size)``.
        tasks: how many run it, each on its own files.
    """

    name: str
    pipeline: list[Any]
    tasks: int


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's executor on this machine, with a pool that notices a killed worker, and without its log on stderr."""

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        if not ranks:
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megatron_med.corpus.build"])  # imported once, not by every worker
        with ProcessPoolExecutor(min(self.workers, len(ranks)), context) as pool:
            tasks = [pool.submit(_run_quietly, self, rank) for rank in ranks]
            done, waiting = wait(tasks, return_when=FIRST_EXCEPTION)
            for task in waiting:
                task.cancel()
            _raise_first(done, Path(str(self.logging_dir.path)))


def _raise_first(done: set[Future[None]], logs: Path) -> None:
    for error in filter(None, (task.exception() for task in done)):
        if isinstance(error, BrokenProcessPool):
            raise DataError(
                f"A worker process was killed (out of memory?); see {logs}. What is finished stays: start the same "
                "command again, with fewer workers."
            ) from error
        raise error


def _run_quietly(executor: LocalExecutor, rank: int) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        logger.remove()
        executor._run_for_rank(rank)


def is_finished(stage: Stage, logs: Path) -> bool:
    """Whether every task of a stage has been marked as done."""
    return all((logs / stage.name / "completions" / f"{rank:05d}").exists() for rank in range(stage.tasks))


def run_stages(stages: list[Stage], execution: Execution, logs: Path, report: Callable[[str], None]) -> None:
    """Runs the stages in order. Tasks that have finished before are not run again.

    On a cluster this returns when the last stage is done (ray) or when all are queued (slurm).
    """
    before: PipelineExecutor | None = None
    for stage in stages:
        executor = _executor(stage, execution, logs / stage.name, before)
        todo = len(executor.get_incomplete_ranks())
        if todo == 0:
            report(f"{stage.name}: done before")
            continue
        report(f"{stage.name}: {todo} of {stage.tasks} tasks{' queued' if execution.kind == 'slurm' else ''}")
        try:
            executor.run()
        except subprocess.CalledProcessError as error:
            raise ConfigError(f"{error.cmd[0]} refused {stage.name}; its own words are above.") from error
        before = executor


def _executor(stage: Stage, execution: Execution, logs: Path, before: PipelineExecutor | None) -> PipelineExecutor:
    logger.remove()
    if execution.kind == "local":
        return LocalExecutor(stage.pipeline, stage.tasks, execution.workers, str(logs))
    options: dict[str, Any] = {"logging_dir": str(logs), "depends": before, "workers": execution.workers}
    options |= execution.options
    try:
        return _cluster_executor(stage, execution.kind, options)
    except TypeError as error:
        raise ConfigError(f"execution.options: datatrove's {execution.kind} executor says: {error}.") from error
    except ImportError as error:
        raise ConfigError(f"execution.kind {execution.kind} needs {error.name}: pip install {error.name}.") from error


def _cluster_executor(stage: Stage, kind: str, options: dict[str, Any]) -> PipelineExecutor:
    if kind == "slurm":
        from datatrove.executor.slurm import SlurmPipelineExecutor

        options.setdefault("env_command", f"export PATH={Path(sys.executable).parent}:$PATH")
        return SlurmPipelineExecutor(stage.pipeline, stage.tasks, job_name=f"corpus-{stage.name}", **options)
    from datatrove.executor.ray import RayPipelineExecutor

    return RayPipelineExecutor(stage.pipeline, stage.tasks, **options)
