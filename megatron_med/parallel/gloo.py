"""Gloo's threads on a machine with fewer cores than ranks."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_LOOP = "gloo_tcp_loop"
_LOWEST = 19


def yield_to_computation() -> None:
    """Gives the threads that watch gloo's sockets the lowest priority, those of all groups that there are.

    Such a thread does not sleep while a message lies there that nobody has asked for yet: a rank that still computes
    shares its core with it. What it does is delayed by this only where ranks compute. Linux only; elsewhere threads
    have no priority of their own.
    """
    tasks = Path("/proc/self/task")
    for task in tasks.iterdir() if tasks.is_dir() else ():
        with suppress(OSError):  # it has ended meanwhile
            if (task / "comm").read_text(encoding="ascii").strip() == _LOOP:
                os.setpriority(os.PRIO_PROCESS, int(task.name), _LOWEST)
