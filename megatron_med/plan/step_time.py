"""From a stage and what things cost to the time of its passes, of the schedule and of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megatron_med.parallel.schedule import Action, Backward, BackwardInput, BackwardWeight, Forward
from megatron_med.parallel.simulation import Simulation, Waits, simulate
from megatron_med.plan.cost_model import CostModel
from megatron_med.plan.exposed_comm import fully_sharded_pass, unit_gathers, unit_reductions
from megatron_med.plan.stage_model import StageModel

Part = Literal["forward", "backward", "backward_weight"]


def forward_seconds(stage: StageModel, chunk: int, cost: CostModel) -> float:
    """Of a micro-batch through a chunk."""
    compute = _part(stage, chunk, cost, "forward")
    return fully_sharded_pass(compute, _gathers_of_a_pass(stage, chunk, cost), (), cost)


def backward_seconds(stage: StageModel, chunk: int, cost: CostModel) -> float:
    """Of the whole backward pass, its weight part included."""
    compute = sum(_part(stage, chunk, cost, part) for part in _parts(stage)[1:])
    gathers = _gathers_of_a_pass(stage, chunk, cost)
    reductions = unit_reductions(stage, chunk, cost) if gathers else ()
    return fully_sharded_pass(compute, gathers, reductions, cost)


def tensor_seconds(stage: StageModel, chunk: int, cost: CostModel) -> float:
    """Of both passes, waiting for tensor-parallel collectives."""
    return sum(_part(stage, chunk, cost, part) - _part(stage, chunk, cost, part, True) for part in _parts(stage))


def simulate_step(stages: Sequence[StageModel], cost: CostModel) -> Simulation:
    """The schedule with the times of every stage and message."""
    transfers = [0.0] * len(stages)
    if len(stages) > 1:
        for stage in stages:
            ranks = stage.groups["pp"].ranks
            pair = (ranks[stage.index], ranks[(stage.index + 1) % len(stages)])
            transfers[stage.index] = cost.transfer("send", stages[0].hidden_bytes, pair)
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
    """Of the slowest stage: the memory traffic of norm, clipping, AdamW, copies into and out of buckets, zeroing.

    Per owned element: norm 4 bytes, clipping 8, AdamW 28 (read weight, gradient and moments, write all but the
    gradient), rounding 4 + itemsize. Per element of the stage: zeroing 4, and where slices are cut packing 8,
    unpacking 2 x itemsize.
    """

    def moved(stage: StageModel) -> int:
        state, itemsize = stage.state, stage.itemsize
        copies = state.elements * (8 + 2 * itemsize) if state.is_sharded else 0
        return state.owned * (4 + 8 + 28 + 4 + itemsize) + state.elements * 4 + copies

    return max(cost.memory(moved(stage)) for stage in stages)


def _action_seconds(stage: StageModel, cost: CostModel) -> dict[tuple[type[Action], int], float]:
    """(kind of action, chunk) -> seconds."""
    seconds: dict[tuple[type[Action], int], float] = {}
    for chunk in range(len(stage.traces)):
        seconds[Forward, chunk] = forward_seconds(stage, chunk, cost)
        seconds[Backward, chunk] = backward_seconds(stage, chunk, cost)
        seconds[BackwardInput, chunk] = _part(stage, chunk, cost, "backward")
        seconds[BackwardWeight, chunk] = _part(stage, chunk, cost, "backward_weight")
    return seconds


def _parts(stage: StageModel) -> list[Part]:
    """What a micro-batch runs."""
    splits = stage.config.parallel.schedule == "zero_bubble"
    return ["forward", "backward", "backward_weight"] if splits else ["forward", "backward"]


def _part(stage: StageModel, chunk: int, cost: CostModel, part: Part, free_collectives: bool = False) -> float:
    """Computation and tensor-parallel collectives of one part."""
    return stage.traces[chunk].total(lambda layers: cost.trace(getattr(layers, part), stage.groups, free_collectives))


def _gathers_of_a_pass(stage: StageModel, chunk: int, cost: CostModel) -> list[float]:
    """Under FSDP2 without pipeline; in a pipeline weights are gathered once a step."""
    if stage.config.parallel.sharding != "full" or stage.config.parallel.pipeline > 1:
        return []
    return unit_gathers(stage, chunk, cost)
