"""What a step takes beside computation: data-parallel communication that nothing hides, and the optimizer."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_med.config import Config
from megatron_med.model.build import DTYPES
from megatron_med.parallel.context import Axis
from megatron_med.parallel.simulation import Interval, Simulation
from megatron_med.plan.price import Pricer
from megatron_med.plan.stage import BuiltStage
from megatron_med.plan.traffic import sharded_units


def data_parallel_seconds(
    config: Config,
    built: Sequence[BuiltStage],
    pricers: Sequence[Pricer],
    axes: Sequence[dict[str, Axis]],
    simulation: Simulation,
) -> tuple[float, float]:
    """Exposed communication and optimizer seconds of a step.

    A stage reduces its buckets under its last backward pass and gathers new weights under its first forward pass;
    what is left over, and what the other stages' idle time does not swallow, is exposed.

    Returns:
        Seconds of communication, seconds of the optimizer.
    """
    overlap = config.parallel.overlap
    communication, gathered, tied, update = simulation.makespan, 0.0, 0.0, 0.0
    for stage, (held, pricer) in enumerate(zip(built, pricers, strict=True)):
        own = [interval for interval in simulation.intervals if interval[0] == stage]
        first, last = min(own, key=_start), max(own, key=_end)
        cover = _end(last) - _start(last) if overlap.gradient_reduce else 0.0
        left = _left_over(_reductions(config, held, pricer, axes[stage]), cover)
        communication = max(communication, _end(last) + left)
        cover = _end(first) if overlap.weight_gather else 0.0
        gathered = max(gathered, _left_over(_gathers(config, held, pricer, axes[stage]), cover))
        tied = max(tied, _tied(held, pricer, axes[stage]))
        update = max(update, _update(config, held, pricer))
    return communication - simulation.makespan + tied + gathered, update


def _start(interval: Interval) -> float:
    return interval[2]


def _end(interval: Interval) -> float:
    return interval[3]


def beside_gathers(compute: float, gathers: Sequence[float], reductions: Sequence[float], pricer: Pricer) -> float:
    """Seconds of a pass under FSDP2: each layer's weights are gathered under the layer before it, its gradients cut
    under the one behind. The first gather and the last reduction have nothing to hide under."""
    if not gathers:
        return compute
    hidden = sum(gathers[1:]) + sum(reductions[:-1])
    return gathers[0] + max(hidden, pricer.beside(0.0, compute, hidden)) + sum(reductions[-1:])


def unit_gathers(config: Config, held: BuiltStage, chunk: int, pricer: Pricer, axes: dict[str, Axis]) -> list[float]:
    """Seconds of gathering each unit that FSDP2 cuts a chunk into."""
    itemsize = DTYPES[config.precision].itemsize
    units = sharded_units(held, chunk, axes["dp_shard"].size)
    return [pricer.transfer("all_gather", float(itemsize) * u.elements, axes["dp_shard"].ranks) for u in units]


def unit_reductions(held: BuiltStage, chunk: int, pricer: Pricer, axes: dict[str, Axis]) -> list[float]:
    """Seconds of cutting each unit's fp32 gradients."""
    units = sharded_units(held, chunk, axes["dp_shard"].size)
    return [pricer.transfer("reduce_scatter", 4.0 * unit.elements, axes["dp_shard"].ranks) for unit in units]


def _left_over(calls: Sequence[float], hidden_under: float) -> float:
    """Seconds of back-to-back collectives that computation does not hide; the last one never is."""
    if not calls:
        return 0.0
    return max(sum(calls) - hidden_under, calls[-1])


def _reductions(config: Config, held: BuiltStage, pricer: Pricer, axes: dict[str, Axis]) -> list[float]:
    """Seconds of each gradient reduction that comes once a step."""
    if config.parallel.sharding == "none":
        return [pricer.transfer("all_reduce", 4.0 * whole, axes["dp"].ranks) for whole, _ in held.buckets]
    shard, replicas = axes["dp_shard"], axes["dp_replicate"]
    if config.parallel.sharding == "full":
        chunks = range(len(held.chunks))
        once = [unit_reductions(held, chunk, pricer, axes) for chunk in chunks] if config.parallel.pipeline > 1 else []
        slices = 4.0 * sum(parameter.slice for parameter in held.parameters)
        return [*(call for calls in once for call in calls), pricer.transfer("all_reduce", slices, replicas.ranks)]
    return [
        pricer.transfer("reduce_scatter", 4.0 * row * shard.size, shard.ranks)
        + pricer.transfer("all_reduce", 4.0 * row, replicas.ranks)
        for _, row in held.buckets
    ]


def _gathers(config: Config, held: BuiltStage, pricer: Pricer, axes: dict[str, Axis]) -> list[float]:
    """Seconds of each gathering of weights that comes once a step."""
    if config.parallel.sharding == "full" and config.parallel.pipeline > 1:
        chunks = range(len(held.chunks))
        return [call for chunk in chunks for call in unit_gathers(config, held, chunk, pricer, axes)]
    if config.parallel.sharding != "optimizer":
        return []
    shard, itemsize = axes["dp_shard"], DTYPES[config.precision].itemsize
    return [pricer.transfer("all_gather", float(itemsize) * row * shard.size, shard.ranks) for _, row in held.buckets]


def _tied(held: BuiltStage, pricer: Pricer, axes: dict[str, Axis]) -> float:
    """All-reduce of tied embedding gradients between the first and the last stage."""
    shared = sum(parameter.slice for parameter in held.parameters if parameter.layout.shared)
    return pricer.transfer("all_reduce", 4.0 * shared, axes["embedding"].ranks)


def _update(config: Config, held: BuiltStage, pricer: Pricer) -> float:
    """Memory traffic of norm, clipping, AdamW, copies into and out of buckets, zeroing.

    Per owned element: norm 4 bytes, clipping 8, AdamW 28 (read weight, gradient and moments, write all but the
    gradient), rounding 4 + itemsize. Per whole element: zeroing 4, and where slices are cut packing 8, unpacking
    2 x itemsize.
    """
    itemsize = DTYPES[config.precision].itemsize
    owned = sum(parameter.slice for parameter in held.parameters)
    whole = held.elements
    moved = owned * (4 + 8 + 28 + 4 + itemsize) + whole * 4
    if held.is_cut:
        moved += whole * (8 + 2 * itemsize)
    return pricer.memory(moved)
