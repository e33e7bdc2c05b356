"""Weak scaling: tokens per second over 1, 2, 4, 8 ranks, each with the same work, against so many times one rank's.

    python tools/benchmark/scaling.py --preset llama-10m --ranks 1 2 4 8

Sizes take turns, in processes of their own. More ranks than cores share them: then the figure says what the messages
and the processes cost, and the share of ``cores`` in the table is what could be had.
"""

from __future__ import annotations

import json
import os
import statistics
from datetime import timedelta

import torch.distributed as dist
from report import Report, add_json_argument, in_own_process
from synthetic import make_config, make_step, random_ids, seconds_of, step_parser

from megatron_med.config.schema import ParallelConfig
from megatron_med.errors import run_command
from megatron_med.launch.process_group import start_process_group
from megatron_med.parallel.context import create_context

WARM_UP = 2


def main() -> None:
    parser = step_parser(__doc__, steps=7, micro_batches=2)
    add_json_argument(parser)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--sharding", choices=("none", "optimizer", "full"), default="optimizer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", action="store_true", help="this process is one of the ranks")
    arguments = parser.parse_args()
    if arguments.rank:
        _run_rank(arguments)
        return
    names = ("preset", "precision", "sequence_length", "micro_batch_size", "micro_batches", "sharding", "rounds")
    named = {name: getattr(arguments, name) for name in names}
    report = Report(f"weak scaling {arguments.preset} {arguments.precision}", named | {"cores": os.cpu_count()})
    options = [word for name in names[:6] for word in (f"--{name.replace('_', '-')}", str(named[name]))]
    rates: dict[int, list[float]] = {ranks: [] for ranks in arguments.ranks}
    for _ in range(arguments.rounds):
        for ranks, found in rates.items():
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            steps = ["--steps", str(arguments.steps), "--rank"]
            result = in_own_process([*launcher, __file__, *options, *steps])
            if "error" in result:
                report.left_out[f"{ranks} ranks"] = result["error"]
            else:
                found.append(result["tokens/s"])
    one = statistics.median(rates[min(rates)]) / min(rates)
    for ranks, found in rates.items():
        if found:
            rate = statistics.median(found)
            spread = (max(found) - min(found)) / rate
            report.rows.append({"ranks": ranks, "tokens/s": rate, "of one rank's": rate / (ranks * one)})
            report.rows[-1] |= {"cores": min(1.0, (os.cpu_count() or 1) / ranks), "spread": spread}
    report.show()
    if arguments.json:
        report.write(arguments.json)


def _run_rank(arguments: object) -> None:
    """Trains; the first rank prints the median rate of all ranks together."""
    settings = vars(arguments)
    device, _ = start_process_group(timedelta(minutes=10))
    parallel = ParallelConfig(sharding=settings["sharding"])
    context = create_context(parallel, device)
    config = make_config(
        settings["preset"], settings["sequence_length"], settings["micro_batch_size"], settings["precision"], parallel
    )
    ids = random_ids(config, device, seed=context.batch.rank)
    _, step = make_step(config, context, ids, settings["micro_batches"])
    seconds = [seconds_of(step, device) for _ in range(settings["steps"] + WARM_UP)][WARM_UP:]
    tokens = settings["micro_batches"] * settings["micro_batch_size"] * settings["sequence_length"] * context.world.size
    if context.world.is_first:
        print(json.dumps({"tokens/s": tokens / statistics.median(seconds)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
