"""What each overlap of communication and computation saves: step times with it off, as a ratio to all on.

    torchrun --nproc-per-node 4 tools/benchmark/overlap.py --tensor 2 --preset llama-10m

All settings take turns, step by step, in one run; medians over the slowest rank of each step are printed.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from report import Report, add_json_argument
from synthetic import make_config, make_step, random_ids, seconds_of, step_parser

from megatron_med.config.schema import OverlapConfig, ParallelConfig
from megatron_med.config.validate import validate
from megatron_med.errors import ConfigError, run_command
from megatron_med.launch.process_group import start_process_group
from megatron_med.parallel.collectives import all_reduce
from megatron_med.parallel.context import create_context

SETTINGS = {
    "all on": OverlapConfig(),
    "gradient_reduce off": OverlapConfig(gradient_reduce=False),
    "weight_gather off": OverlapConfig(weight_gather=False),
    "tensor off": OverlapConfig(tensor=False),
    "pipeline off": OverlapConfig(pipeline=False),
    "all off": OverlapConfig(False, False, False, False),
}
WARM_UP = 2


def main() -> None:
    parser = step_parser(__doc__, steps=9, micro_batches=4)
    parser.set_defaults(precision="bf16")
    add_json_argument(parser)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--schedule", default="1f1b", choices=("gpipe", "1f1b", "interleaved", "zero_bubble"))
    arguments = parser.parse_args()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    parallel = ParallelConfig(
        tensor=arguments.tensor,
        pipeline=arguments.pipeline,
        schedule=arguments.schedule,
        virtual_stages=2 if arguments.schedule == "interleaved" else 1,
    )
    config = make_config(
        arguments.preset, arguments.sequence_length, arguments.micro_batch_size, arguments.precision, parallel
    )
    config.train.global_batch_size *= config.parallel.data_size(world_size) or 1
    faults = [fault for fault in validate(config, world_size) if "data.train" not in fault]
    if faults:
        raise ConfigError(faults)
    device, _ = start_process_group(timedelta(minutes=10))
    steps = {}
    for name, overlap in SETTINGS.items():
        config.parallel.overlap = overlap
        context = create_context(config.parallel, device)
        ids = random_ids(config, device, seed=context.batch.rank)
        _, steps[name] = make_step(config, context, ids, arguments.micro_batches)
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for turn in range(arguments.steps + WARM_UP):
        for name, step in steps.items():
            slowest = all_reduce(
                torch.tensor(seconds_of(step, device), device=device), context.world, dist.ReduceOp.MAX
            )
            if turn >= WARM_UP:
                seconds[name].append(slowest.item())
    if context.world.is_first:
        names = ("preset", "precision", "tensor", "pipeline", "schedule", "micro_batches", "steps")
        named = {name: getattr(arguments, name) for name in names}
        grid = f"{world_size} ranks, tensor {arguments.tensor}, pipeline {arguments.pipeline}, {arguments.schedule}"
        report = Report(f"overlap {arguments.preset} {arguments.precision}, {grid}", named | {"ranks": world_size})
        report.add_turns(seconds)
        report.show()
        if arguments.json:
            report.write(arguments.json)
    dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
