"""Bytes and calls of every group in one step, on one rank of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_med.config import Config
from megatron_med.model.build import DTYPES
from megatron_med.parallel.context import Axis
from megatron_med.parallel.schedule import Action, Backward, BackwardInput, Forward
from megatron_med.plan.pieces import ChunkCost, Piece
from megatron_med.plan.stage import BuiltStage

GROUPS = ("tp", "pp", "dp_shard", "dp_replicate", "dp", "embedding", "world")


@dataclass(frozen=True)
class Traffic:
    """Of one group, per step and rank.

    Attributes:
        calls: collectives issued; of a pipeline messages sent.
        size: bytes of their whole tensors (the larger of input and output).
    """

    calls: int = 0
    size: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.calls + other.calls, self.size + other.size)


def stage_traffic(
    config: Config,
    built: BuiltStage,
    costs: Sequence[ChunkCost],
    actions: Sequence[Action],
    axes: dict[str, Axis],
) -> dict[str, Traffic]:
    """Group -> traffic of one step without validation and checkpoints.

    Args:
        config: the run.
        built: the stage.
        costs: of each of its chunks.
        actions: its schedule.
        axes: of one of its ranks: tp, pp, dp, dp_shard, dp_replicate, embedding, world.
    """
    traffic = dict.fromkeys(GROUPS, Traffic())
    traffic["tp"] = _tensor(built, costs, actions, axes)
    traffic["pp"] = _pipeline(built, costs, actions, axes["pp"])
    if config.parallel.sharding == "full":
        traffic |= _fully_sharded(config, built, actions, axes)
    else:
        traffic |= _bucketed(config, built, axes)
    traffic["embedding"] = _tied(built, axes)
    if axes["dp"].size > 1:
        traffic["dp"] += Traffic(1, 8)  # tokens of the global batch
    if axes["world"].size > 1:
        traffic["world"] += Traffic(2, 8 + 16)  # gradient norm; loss and stop flag
    return {group: value for group, value in traffic.items() if value.calls}


def passes(actions: Sequence[Action], chunk: int) -> int:
    """Micro-batches that a chunk sees in a step."""
    return sum(isinstance(action, Forward) and action.chunk == chunk for action in actions)


def _tensor(built: BuiltStage, costs: Sequence[ChunkCost], actions: Sequence[Action], axes: dict[str, Axis]) -> Traffic:
    if axes["tp"].size == 1:
        return Traffic()
    total = Traffic()
    for chunk, cost in enumerate(costs):
        calls = round(cost.total(lambda piece: len(_all_collectives(piece))))
        size = cost.total(lambda piece: sum(event.size for event in _all_collectives(piece)))
        count = passes(actions, chunk)
        total += Traffic(calls * count, size * count)
    partial = sum(held.slice for held in built.parameters if held.layout.partial_over_tp)
    return total + (Traffic(1, 4.0 * partial) if partial else Traffic())


def _all_collectives(piece: Piece) -> list:
    later = piece.weight_products.collectives if piece.weight_products else []
    return piece.forward.collectives + piece.backward.collectives + later


def _pipeline(built: BuiltStage, costs: Sequence[ChunkCost], actions: Sequence[Action], pp: Axis) -> Traffic:
    """Hidden states to the next stage, gradients to the one before."""
    if pp.size == 1:
        return Traffic()
    sent = 0
    for action in actions:
        chunk = built.chunks[action.chunk]
        if isinstance(action, Forward):
            sent += not chunk.is_last
        elif isinstance(action, (Backward, BackwardInput)):
            sent += not chunk.is_first
    return Traffic(sent, float(sent * costs[0].ends.hidden_bytes))


def _bucketed(config: Config, built: BuiltStage, axes: dict[str, Axis]) -> dict[str, Traffic]:
    """fp32 gradients are reduced, weights gathered, once a step."""
    calls = len(built.buckets)
    whole = sum(elements for elements, _ in built.buckets)
    if config.parallel.sharding == "none":
        return {"dp": Traffic(calls, 4.0 * whole) if axes["dp"].size > 1 else Traffic()}
    ranks = axes["dp_shard"].size
    rows = sum(row for _, row in built.buckets)
    traffic = {}
    if ranks > 1:
        itemsize = DTYPES[config.precision].itemsize
        traffic["dp_shard"] = Traffic(2 * calls, (4.0 + itemsize) * rows * ranks)
    if axes["dp_replicate"].size > 1:
        traffic["dp_replicate"] = Traffic(calls, 4.0 * rows)
    return traffic


def _fully_sharded(
    config: Config, built: BuiltStage, actions: Sequence[Action], axes: dict[str, Axis]
) -> dict[str, Traffic]:
    """Each layer's weights are gathered for every pass, its gradients cut after every backward pass; in a pipeline
    both once a step."""
    itemsize = DTYPES[config.precision].itemsize
    in_pipeline = config.parallel.pipeline > 1
    ranks = axes["dp_shard"].size
    traffic = {"dp_shard": Traffic(), "dp_replicate": Traffic()}
    for chunk in range(len(built.chunks)):
        count = 1 if in_pipeline else passes(actions, chunk)
        for unit in sharded_units(built, chunk, ranks):
            gathers = 1 if in_pipeline else 2 * count - unit.stays * count
            traffic["dp_shard"] += Traffic(gathers + count, unit.elements * (itemsize * gathers + 4.0 * count))
            if axes["dp_replicate"].size > 1:
                traffic["dp_replicate"] += Traffic(1, 4.0 * unit.elements / ranks)
    return traffic


@dataclass(frozen=True)
class ShardedUnit:
    """What FSDP2 gathers in one call.

    Attributes:
        elements: padded to the ranks.
        stays: it is the chunk's own (embedding, norm, head), which keeps its weights from forward to backward.
    """

    elements: int
    stays: bool


def sharded_units(built: BuiltStage, chunk: int, ranks: int) -> list[ShardedUnit]:
    """The layers of a chunk and what is around them."""
    own = built.chunks[chunk]
    layers = {str(layer): 0 for layer in own.layers}
    around = 0
    for held in built.parameters:
        kind, *rest = held.layout.name.split(".")
        if kind == "layers" and rest[0] in layers:
            layers[rest[0]] += held.slice * ranks
        elif (kind == "embedding" and own.is_first) or (kind not in ("layers", "embedding") and own.is_last):
            around += held.slice * ranks
    units = [ShardedUnit(elements, False) for elements in layers.values()]
    return units + ([ShardedUnit(around, True)] if around else [])


def _tied(built: BuiltStage, axes: dict[str, Axis]) -> Traffic:
    """Embedding gradients of the first and the last stage."""
    pp = axes["pp"]
    if axes["embedding"].size == 1 or not (pp.is_first or pp.is_last):
        return Traffic()
    shared = sum(held.slice for held in built.parameters if held.layout.shared)
    return Traffic(1, 4.0 * shared) if shared else Traffic()
