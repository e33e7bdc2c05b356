"""Pipeline schedules against the simulator: what a step takes, and what the durations of its passes say it must take.

    torchrun --nproc-per-node 2 tools/benchmark/schedules.py --preset llama-10m --micro-batches 8

All schedules take turns, step by step, in one run; medians over the slowest rank. The passes of the same steps are
timed without the wait for a message, and the simulator (parallel/pipeline_parallel/simulation.py) puts their medians
together.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from report import Report, add_json_argument
from synthetic import make_config, random_ids, step_parser

from megatron_med.config.schema import ParallelConfig
from megatron_med.errors import ConfigError, run_command
from megatron_med.launch.process_group import start_process_group
from megatron_med.model.batch import plain_batch
from megatron_med.parallel.collectives import Pending, all_reduce, gather_objects
from megatron_med.parallel.context import ParallelContext, create_context
from megatron_med.parallel.pipeline_parallel.schedule import GENERATORS, Action, BackwardWeight, Forward
from megatron_med.parallel.pipeline_parallel.simulation import simulate
from megatron_med.train.setup import build_train_module
from megatron_med.train.step import TrainModule, compute_gradients
from megatron_med.train.timers import StepTimer

WARM_UP = 2
Kind = tuple[type[Action], int]
"""Type of an action, chunk."""


@dataclass
class _Contestant:
    """A schedule with its model on this rank.

    Attributes:
        passes: seconds of each kind of action, without the wait for its message.
        steps: seconds of the slowest rank.
    """

    train_module: TrainModule
    passes: dict[Kind, list[float]] = field(default_factory=lambda: defaultdict(list))
    steps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        engine: Any = self.train_module.engine
        forward, backward, weight_grads = engine._forward, engine._backward, engine._run_weight_grads

        def timed(kind: Kind, arriving: Pending | None, run: Callable[..., Any], *operands: Any) -> Any:
            if arriving is not None:
                arriving.wait()
            start = time.perf_counter()
            result = run(*operands)
            self.passes[kind].append(time.perf_counter() - start)
            return result

        engine._forward = lambda action, batch, arriving, scale: timed(
            (Forward, action.chunk), arriving, forward, action, batch, arriving, scale
        )
        engine._backward = lambda action, item, arriving, scale: timed(
            (type(action), action.chunk), arriving, backward, action, item, arriving, scale
        )
        engine._run_weight_grads = lambda item: timed((BackwardWeight, 0), None, weight_grads, item)


def main() -> None:
    parser = step_parser(__doc__, steps=9, micro_batches=8)
    add_json_argument(parser)
    arguments = parser.parse_args()
    stages = int(os.environ.get("WORLD_SIZE", "1"))
    if stages < 2:
        raise ConfigError("A pipeline has two stages at least: start it with torchrun --nproc-per-node 2.")
    device, _ = start_process_group(timedelta(minutes=10))
    contestants = {}
    for schedule in GENERATORS:
        virtual = 2 if schedule == "interleaved" else 1
        parallel = ParallelConfig(pipeline=stages, schedule=schedule, virtual_stages=virtual)  # type: ignore[arg-type]
        config = make_config(
            arguments.preset, arguments.sequence_length, arguments.micro_batch_size, arguments.precision, parallel
        )
        context = create_context(parallel, device)
        contestants[schedule] = _Contestant(build_train_module(config, context))
    ids = random_ids(config, device)
    batches = [plain_batch(ids[:, :-1], ids[:, 1:])] * arguments.micro_batches
    for turn in range(arguments.steps + WARM_UP):
        for contestant in contestants.values():
            if turn == WARM_UP:
                contestant.passes.clear()
            elapsed = _slowest(contestant.train_module, batches, context)
            if turn >= WARM_UP:
                contestant.steps.append(elapsed)
    named = {name: getattr(arguments, name) for name in ("preset", "precision", "micro_batches", "steps")}
    report = Report(f"schedules {arguments.preset} {arguments.precision}", named | {"stages": stages})
    report.add_turns({name: contestant.steps for name, contestant in contestants.items()})
    for row, (name, contestant) in zip(report.rows, contestants.items(), strict=True):
        row |= _prediction(name, contestant, context, arguments.micro_batches)
        row["measured / predicted"] = row["ms"] / row["predicted ms"]
    if context.world.is_first:
        report.show()
        if arguments.json:
            report.write(arguments.json)
    dist.destroy_process_group()


def _slowest(train_module: TrainModule, batches: list[Any], context: ParallelContext) -> float:
    """Seconds of forward and backward passes over all micro-batches, of the rank that takes longest."""
    all_reduce(torch.zeros(1, device=context.device), context.world)  # all begin together
    start = time.perf_counter()
    compute_gradients(train_module, batches, StepTimer(context.device))
    elapsed = torch.tensor(time.perf_counter() - start, device=context.device)
    for item in train_module.optimizer.owned:
        item.gradient.zero_()
    return all_reduce(elapsed, context.world, dist.ReduceOp.MAX).item()


def _prediction(name: str, contestant: _Contestant, context: ParallelContext, micro_batches: int) -> dict[str, float]:
    """Time and idle share of a step whose passes take the medians that were measured on each stage."""
    own = {kind: statistics.median(times) for kind, times in contestant.passes.items()}
    stages = gather_objects(own, context.world)
    schedule = GENERATORS[name](context.pp.size, micro_batches, len(contestant.train_module.chunks))
    simulation = simulate(schedule, durations=lambda stage, action: stages[stage][type(action), action.chunk])
    return {"predicted ms": 1e3 * simulation.makespan, "idle": simulation.bubble_share}


if __name__ == "__main__":
    run_command(main)
