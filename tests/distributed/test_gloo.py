"""Gloo's threads on a machine with fewer cores than ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_med.config import ParallelConfig
from megatron_med.parallel.context import create_context
from tests.ranks import run_ranks


def _priorities(tensor: int) -> dict[str, set[int]]:
    """Of this rank's threads by their name, after the groups of a grid were made."""
    create_context(ParallelConfig(tensor=tensor), torch.device("cpu"))
    found: dict[str, set[int]] = {}
    for task in Path("/proc/self/task").iterdir():
        name = (task / "comm").read_text().strip()
        found.setdefault(name, set()).add(os.getpriority(os.PRIO_PROCESS, int(task.name)))
    return found


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads have a priority of their own on Linux only")
def test_threads_that_watch_sockets_do_not_take_the_cores_of_ranks_that_compute() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    for threads in run_ranks(2, _priorities, 2):
        assert threads.pop("gloo_tcp_loop") == {19}
        assert all(priorities == {own} for priorities in threads.values()), "nothing else is slowed"
