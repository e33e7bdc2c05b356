"""Data-parallel communication that no computation hides."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_med.parallel.pipeline_parallel.simulation import Interval, Simulation
from megatron_med.plan.cost_model import CostModel
from megatron_med.plan.stage_model import StageModel
from megatron_med.plan.step_time import unit_gathers, unit_reductions


def exposed_seconds(stages: Sequence[StageModel], cost: CostModel, simulation: Simulation) -> float:
    """Seconds of a step's exposed data-parallel communication.

    A stage reduces its buckets under its last backward pass and gathers new weights under its first forward pass;
    what is left over, and what the other stages' idle time does not swallow, is exposed.
    """
    overlap = stages[0].config.parallel.overlap
    reduced, gathered, tied = simulation.makespan, 0.0, 0.0
    for stage in stages:
        own = [interval for interval in simulation.intervals if interval[0] == stage.index]
        first, last = min(own, key=_start), max(own, key=_end)
        # A stage that ends early reduces while the others still compute: only the last end counts.
        cover = _end(last) - _start(last) if overlap.gradient_reduce else 0.0
        reduced = max(reduced, _end(last) + _left_over(_reductions(stage, cost), cover))
        cover = _end(first) if overlap.weight_gather else 0.0
        gathered = max(gathered, _left_over(_gathers(stage, cost), cover))
        tied = max(tied, cost.transfer_seconds("all_reduce", 4.0 * stage.state.tied, stage.groups["embedding"].ranks))
    return reduced - simulation.makespan + tied + gathered


def _start(interval: Interval) -> float:
    return interval[2]


def _end(interval: Interval) -> float:
    return interval[3]


def _left_over(calls: Sequence[float], hidden_under: float) -> float:
    """Seconds of back-to-back collectives that computation does not hide; the last one never is."""
    if not calls:
        return 0.0
    return max(sum(calls) - hidden_under, calls[-1])


def _reductions(stage: StageModel, cost: CostModel) -> list[float]:
    """Seconds of each gradient reduction that comes once a step."""
    parallel, state, groups = stage.config.parallel, stage.state, stage.groups
    if parallel.sharding == "none":
        ranks = groups["loss"].ranks
        return [cost.transfer_seconds("all_reduce", 4.0 * bucket.elements, ranks) for bucket in state.buckets]
    shard, replicas = groups["fsdp"], groups["dp_replicate"].ranks
    if parallel.sharding == "full":
        chunks = range(len(state.chunks)) if parallel.pipeline > 1 else ()
        once = [call for chunk in chunks for call in unit_reductions(stage, chunk, cost)]
        return [*once, cost.transfer_seconds("all_reduce", 4.0 * state.owned, replicas)]
    return [
        cost.transfer_seconds("reduce_scatter", 4.0 * bucket.shard * shard.size, shard.ranks)
        + cost.transfer_seconds("all_reduce", 4.0 * bucket.shard, replicas)
        for bucket in state.buckets
    ]


def _gathers(stage: StageModel, cost: CostModel) -> list[float]:
    """Seconds of each gathering of weights that comes once a step."""
    parallel, state, shard = stage.config.parallel, stage.state, stage.groups["fsdp"]
    if parallel.sharding == "full" and parallel.pipeline > 1:
        return [call for chunk in range(len(state.chunks)) for call in unit_gathers(stage, chunk, cost)]
    if parallel.sharding != "optimizer":
        return []
    itemsize = float(stage.itemsize)
    return [
        cost.transfer_seconds("all_gather", itemsize * bucket.shard * shard.size, shard.ranks)
        for bucket in state.buckets
    ]
