"""From a stage and what things cost to the time of its passes, of the schedule and of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megatron_med.parallel.pipeline_parallel.schedule import Action, Backward, BackwardInput, Forward
from megatron_med.parallel.pipeline_parallel.simulation import Simulation, Waits, simulate
from megatron_med.plan.cost_model import CostModel
from megatron_med.plan.stage_model import StageModel

Part = Literal["forward", "backward", "backward_weight"]


def forward_seconds(stage: StageModel, chunk: int, cost: CostModel) -> float:
    """Seconds of a micro-batch's forward pass through a chunk."""
    compute = _part(stage, chunk, cost, "forward")
    return _fully_sharded_pass(compute, _gathers_of_a_pass(stage, chunk, cost), (), cost)


def backward_seconds(stage: StageModel, chunk: int, cost: CostModel) -> float:
    """Seconds of its whole backward pass, the weight part included."""
    compute = sum(_part(stage, chunk, cost, part) for part in _parts(stage)[1:])
    gathers = _gathers_of_a_pass(stage, chunk, cost)
    reductions = unit_reductions(stage, chunk, cost) if gathers else ()
    return _fully_sharded_pass(compute, gathers, reductions, cost)


def tensor_seconds(stage: StageModel, chunk: int, cost: CostModel) -> float:
    """Seconds of both passes that tensor-parallel collectives cost."""
    return sum(_part(stage, chunk, cost, part) - _part(stage, chunk, cost, part, True) for part in _parts(stage))


def simulate_step(stages: Sequence[StageModel], cost: CostModel) -> Simulation:
    """The schedule with the times of every stage and message."""
    transfers = [0.0] * len(stages)
    if len(stages) > 1:
        for stage in stages:
            ranks = stage.groups["pp"].ranks
            pair = (ranks[stage.index], ranks[(stage.index + 1) % len(stages)])
            transfers[stage.index] = cost.transfer_seconds("send", stages[0].hidden_bytes, pair)
    waits: Waits = "none" if stages[0].config.parallel.overlap.pipeline else "receiver"
    if cost.kernels.messages == "blocking":
        waits = "sender"
    # A schedule has hundreds of actions of few kinds.
    seconds = [_action_seconds(stage, cost) for stage in stages]
    return simulate(
        [stage.actions for stage in stages],
        durations=lambda stage, action: seconds[stage][type(action), action.chunk],
        transfers=transfers,
        waits=waits,
    )


def optimizer_seconds(stages: Sequence[StageModel], cost: CostModel) -> float:
    """Seconds of the slowest stage: the memory traffic of norm, clipping, AdamW, copies of buckets, zeroing.

    Per owned element: norm 4 bytes, clipping 8, AdamW 28 (read weight, gradient and moments, write all but the
    gradient), rounding 4 + itemsize. Per trained element of the stage: zeroing 4, and where shards are cut packing 8,
    unpacking 2 x itemsize.
    """

    def moved(stage: StageModel) -> int:
        state, itemsize = stage.state, stage.itemsize
        trained = sum(held.elements for held in state.trained)
        copies = trained * (8 + 2 * itemsize) if state.is_sharded else 0
        return state.owned * (4 + 8 + 28 + 4 + itemsize) + trained * 4 + copies

    return max(cost.memory_seconds(moved(stage)) for stage in stages)


def _action_seconds(stage: StageModel, cost: CostModel) -> dict[tuple[type[Action], int], float]:
    """(kind of action, chunk) -> seconds, for the kinds that the stage runs."""

    def seconds(kind: type[Action], chunk: int) -> float:
        if kind is Forward:
            return forward_seconds(stage, chunk, cost)
        if kind is Backward:
            return backward_seconds(stage, chunk, cost)
        return _part(stage, chunk, cost, "backward" if kind is BackwardInput else "backward_weight")

    kinds = {(type(action), action.chunk) for action in stage.actions}
    return {(kind, chunk): seconds(kind, chunk) for kind, chunk in kinds}


def _parts(stage: StageModel) -> list[Part]:
    """What a micro-batch runs."""
    splits = stage.config.parallel.schedule == "zero_bubble"
    return ["forward", "backward", "backward_weight"] if splits else ["forward", "backward"]


def _part(stage: StageModel, chunk: int, cost: CostModel, part: Part, free_collectives: bool = False) -> float:
    """Seconds of one part: computation and tensor-parallel collectives."""
    return stage.traces[chunk].total(
        lambda layers: cost.trace_seconds(getattr(layers, part), stage.groups["tp"].ranks, free_collectives)
    )


def _gathers_of_a_pass(stage: StageModel, chunk: int, cost: CostModel) -> list[float]:
    """Seconds of each gather in a pass under FSDP2; none in a pipeline, where weights are gathered once a step."""
    if stage.config.parallel.sharding != "full" or stage.config.parallel.pipeline > 1:
        return []
    return unit_gathers(stage, chunk, cost)


def _fully_sharded_pass(
    compute: float, gathers: Sequence[float], reductions: Sequence[float], cost: CostModel
) -> float:
    """Seconds of a pass under FSDP2: each layer's weights are gathered under the layer before it, its gradients cut
    under the one after. The first gather and the last reduction have nothing to hide under."""
    if not gathers:
        return compute
    hidden = sum(gathers[1:]) + sum(reductions[:-1])
    return gathers[0] + max(hidden, cost.overlapped(0.0, compute, hidden)) + sum(reductions[-1:])


def unit_gathers(stage: StageModel, chunk: int, cost: CostModel) -> list[float]:
    """Seconds of gathering each unit that FSDP2 cuts a chunk into."""
    ranks, itemsize = stage.groups["fsdp"].ranks, float(stage.itemsize)
    return [cost.transfer_seconds("all_gather", itemsize * unit.elements, ranks) for unit in stage.sharded_units[chunk]]


def unit_reductions(stage: StageModel, chunk: int, cost: CostModel) -> list[float]:
    """Seconds of cutting each unit's fp32 gradients."""
    ranks = stage.groups["fsdp"].ranks
    return [cost.transfer_seconds("reduce_scatter", 4.0 * unit.trained, ranks) for unit in stage.sharded_units[chunk]]
