"""Bytes and calls of every group in one step, on one rank of a stage."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_med.parallel.schedule import Backward, BackwardInput, Forward
from megatron_med.plan.stage_model import StageModel

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


def stage_traffic(stage: StageModel) -> dict[str, Traffic]:
    """Group -> traffic of one step without validation and checkpoints."""
    groups = stage.groups
    traffic = dict.fromkeys(GROUPS, Traffic())
    traffic["tp"] = _tensor(stage)
    traffic["pp"] = _pipeline(stage)
    traffic |= _fully_sharded(stage) if stage.config.parallel.sharding == "full" else _bucketed(stage)
    traffic["embedding"] = _tied(stage)
    if groups["dp"].size > 1:
        traffic["dp"] += Traffic(1, 8)  # tokens of the global batch
    if groups["world"].size > 1:
        traffic["world"] += Traffic(2, 8 + 16)  # gradient norm; loss and stop flag
    return {group: value for group, value in traffic.items() if value.calls}


def _tensor(stage: StageModel) -> Traffic:
    if stage.groups["tp"].size == 1:
        return Traffic()
    total = Traffic()
    for trace in stage.traces:
        calls = round(trace.total(lambda layers: len(layers.collectives)))
        size = trace.total(lambda layers: sum(event.size for event in layers.collectives))
        total += Traffic(calls * stage.micro_batches, size * stage.micro_batches)
    partial = sum(held.slice for held in stage.state.parameters if held.layout.partial_over_tp)
    return total + (Traffic(1, 4.0 * partial) if partial else Traffic())


def _pipeline(stage: StageModel) -> Traffic:
    """Hidden states to the next stage, gradients to the one before."""
    if stage.groups["pp"].size == 1:
        return Traffic()
    sent = 0
    for action in stage.actions:
        chunk = stage.state.chunks[action.chunk]
        if isinstance(action, Forward):
            sent += not chunk.is_last
        elif isinstance(action, (Backward, BackwardInput)):
            sent += not chunk.is_first
    return Traffic(sent, float(sent * stage.hidden_bytes))


def _bucketed(stage: StageModel) -> dict[str, Traffic]:
    """fp32 gradients are reduced, weights gathered, once a step."""
    buckets, groups = stage.state.buckets, stage.groups
    calls = len(buckets)
    if stage.config.parallel.sharding == "none":
        whole = sum(bucket.elements for bucket in buckets)
        return {"dp": Traffic(calls, 4.0 * whole) if groups["dp"].size > 1 else Traffic()}
    ranks = groups["dp_shard"].size
    slices = sum(bucket.slice for bucket in buckets)
    traffic = {}
    if ranks > 1:
        traffic["dp_shard"] = Traffic(2 * calls, (4.0 + stage.itemsize) * slices * ranks)
    if groups["dp_replicate"].size > 1:
        traffic["dp_replicate"] = Traffic(calls, 4.0 * slices)
    return traffic


def _fully_sharded(stage: StageModel) -> dict[str, Traffic]:
    """Each layer's weights are gathered for every pass, its gradients cut after every backward pass; in a pipeline
    both once a step."""
    in_pipeline = stage.config.parallel.pipeline > 1
    ranks = stage.groups["dp_shard"].size
    count = 1 if in_pipeline else stage.micro_batches
    traffic = {"dp_shard": Traffic(), "dp_replicate": Traffic()}
    for units in stage.sharded_units:
        for unit in units:
            gathers = 1 if in_pipeline else count + unit.reshard_after_forward * count
            traffic["dp_shard"] += Traffic(gathers + count, unit.elements * (stage.itemsize * gathers + 4.0 * count))
            if stage.groups["dp_replicate"].size > 1:
                traffic["dp_replicate"] += Traffic(1, 4.0 * unit.elements / ranks)
    return traffic


def _tied(stage: StageModel) -> Traffic:
    """Embedding gradients of the first and the last stage."""
    pp, tied = stage.groups["pp"], stage.state.tied
    if stage.groups["embedding"].size == 1 or not (pp.is_first or pp.is_last):
        return Traffic()
    return Traffic(1, 4.0 * tied) if tied else Traffic()
