"""One run on several grids: their losses, how far apart they lie, and a picture. The last run changes grid on its way.

python tools/benchmark/grids.py CONFIG.yaml --data PREFIX --steps 60 --output DIR [--picture FILE.png]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

RUNS = {
    "1 process": [(1, 1, ())],
    "tensor 2 x pipeline 2 x data 2": [(8, 1, ("tensor=2", "pipeline=2"))],
    "pipeline 2, interleaved, data 2": [(4, 1, ("pipeline=2", "schedule=interleaved", "virtual_stages=2"))],
    "data 4, parameters cut (FSDP)": [(4, 1, ("sharding=full",))],
    "a grid for each third": [
        (4, 3, ("tensor=2", "pipeline=2")),
        (2, 3, ("schedule=zero_bubble", "pipeline=2")),
        (4, 3, ("sharding=full",)),
    ],
}
"""Name -> starts: processes, share of the steps (one over), options of ``parallel``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--data", required=True, help="prefix of token files")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    losses = {name: _losses(name, arguments) for name in RUNS}
    reference = losses["1 process"]
    for name, values in losses.items():
        print(f"{name}: last loss {values[-1]:.6f}, at most {np.abs(values - reference).max():.2g} from one process")
    if arguments.picture:
        _draw(losses, arguments.picture)


def _losses(name: str, arguments: argparse.Namespace) -> np.ndarray:
    run, done = arguments.output / name.replace(" ", "-"), 0
    for processes, share, parallel in RUNS[name]:
        done += arguments.steps // share
        fixed = {"tensor": 1, "pipeline": 1, "schedule": "1f1b"} | dict(option.split("=") for option in parallel)
        options = [word for key, value in fixed.items() for word in (f"--parallel.{key}", str(value))]
        command = [sys.executable, "-m", "megatron_med.commands", "train", "--nproc-per-node", str(processes), "--"]
        command += [str(arguments.config), "--data.train", json.dumps([{"path": arguments.data}]), *options]
        command += ["--train.output_dir", str(run), "--train.steps", str(done), "--train.valid_interval", "0"]
        command += ["--lr_schedule.decay_steps", str(arguments.steps)]
        subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


def _draw(losses: dict[str, np.ndarray], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(9, 5), sharex=True, height_ratios=(3, 1.2), layout="constrained"
    )
    reference = losses["1 process"]
    for number, (name, values) in enumerate(losses.items()):
        steps = np.arange(1, len(values) + 1)
        above.plot(steps, values, label=name, linewidth=9 - 1.8 * number, alpha=0.75)
        if number:
            below.semilogy(steps, np.maximum(np.abs(values - reference), 1e-8), color=f"C{number}", linewidth=1)
    above.set_ylabel("training loss")
    above.legend(frameon=False)
    below.set_ylabel("distance from\none process")
    below.set_xlabel("step")
    below.set_ylim(1e-8, 1)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
