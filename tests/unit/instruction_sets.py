"""Code that runs with the kernels of one instruction set: which it is, a process chooses once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ORDER = ["baseline", "avx2", "avx512"]


def run_with(capability: str, script: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process that is asked for an instruction set; it sees the tests."""
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "MEGATRON_MED_CPU_CAPABILITY": capability},
    )


def is_there(capability: str, best: str) -> bool:
    """Whether a processor whose best instruction set is ``best`` has this one."""
    return capability in ORDER[: ORDER.index(best) + 1]
