"""Seconds from the command to the first finished step, by number of ranks.

python tools/benchmark/startup.py --ranks 1 8 --repeat 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_med.data.indexed import IndexedDatasetWriter
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
        seconds: dict[int, list[float]] = {ranks: [] for ranks in arguments.ranks}
        for turn in range(arguments.repeat):
            for ranks in arguments.ranks:
                seconds[ranks].append(_first_step(Path(folder) / f"run-{ranks}-{turn}", prefix, ranks))
    for ranks, times in seconds.items():
        print(f"{ranks} ranks: {statistics.median(times):.1f} s to the first step (median of {arguments.repeat})")


def _first_step(run: Path, prefix: Path, ranks: int) -> float:
    tensor, pipeline = GRIDS[ranks]
    settings = {
        "model.preset": "llama-tiny",
        "data.sequence_length": 128,
        "data.train": json.dumps([{"path": str(prefix)}]),
        "train.steps": 1,
        "train.global_batch_size": 8,
        "train.output_dir": run,
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "precision": "fp32",
    }
    empty = run.with_suffix(".yaml")
    empty.write_text("{}\n")
    options = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    start = time.time()
    subprocess.run(
        [*launcher, "-m", "megatron_med.train", str(empty), *options], check=True, capture_output=True, timeout=300
    )
    return (run / "metrics.jsonl").stat().st_mtime - start


if __name__ == "__main__":
    run_command(main)
