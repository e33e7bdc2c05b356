"""Seconds from the command to the first finished step, and from a killed rank to the first step after it.

    python tools/benchmark/startup.py --ranks 1 8 --repeat 3

The second is what a fault costs besides the steps that are run again: torchrun notices, ends the others, starts all
ranks, and they load the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_med.data.indexed_writer import IndexedDatasetWriter
from megatron_med.errors import run_command

GRIDS = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (2, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 8], choices=sorted(GRIDS))
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "data"
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_document(np.arange(20_000) % 2000)
        seconds: dict[int, list[tuple[float, float]]] = {ranks: [] for ranks in arguments.ranks}
        for turn in range(arguments.repeat):
            for ranks in arguments.ranks:
                seconds[ranks].append(_measure(Path(folder) / f"run-{ranks}-{turn}", prefix, ranks))
    for ranks, times in seconds.items():
        first, again = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"{ranks} ranks: {first:.1f} s to the first step, {again:.1f} s from a killed rank to the next step "
            f"(medians of {arguments.repeat})"
        )


def _measure(run: Path, prefix: Path, ranks: int) -> tuple[float, float]:
    """Command to first step; killed rank to the first step of the restart."""
    tensor, pipeline = GRIDS[ranks]
    settings = {
        "model.preset": "llama-tiny",
        "data.sequence_length": 128,
        "data.train": json.dumps([{"path": str(prefix)}]),
        "train.steps": 1_000_000,
        "train.global_batch_size": 8,
        "train.output_dir": run,
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "precision": "fp32",
        "checkpoint.interval": 2,
    }
    empty = run.with_suffix(".yaml")
    empty.write_text("{}\n")
    options = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launcher += ["--max-restarts", "1"]
    start = time.time()
    process = subprocess.Popen(
        [*launcher, "-m", "megatron_med.train", str(empty), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        first = _await_line(run, steps=1, after=start)
        _await_line(run, steps=5, after=start)
        ranks_before = _ranks(process.pid)
        os.kill(ranks_before[-1], signal.SIGKILL)
        killed = time.time()
        config = run / "config.yaml"
        while config.stat().st_mtime < killed:  # the restart writes it anew
            time.sleep(0.01)
        again = _await_line(run, steps=1, after=config.stat().st_mtime)
    finally:
        for pid in [process.pid, *_ranks(process.pid)]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    return first - start, again - killed


def _await_line(run: Path, steps: int, after: float) -> float:
    """When the ``steps``-th step was reported that ended after a moment."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists():
            lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
            moments = [moment for line in lines if (moment := json.loads(line)["time"]) > after]
            if len(moments) >= steps:
                return moments[steps - 1]
        time.sleep(0.01)
    raise TimeoutError(f"no step in {run}")


def _ranks(launcher: int) -> list[int]:
    """Process ids of the ranks that a torchrun has started."""
    children = Path(f"/proc/{launcher}/task").glob("*/children")
    return [int(pid) for path in children for pid in path.read_text().split()]


if __name__ == "__main__":
    run_command(main)
