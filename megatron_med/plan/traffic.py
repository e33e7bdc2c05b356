"""Bytes and calls of every group in one step, on one rank of a stage."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_med.parallel.context import AXES, axis_label
from megatron_med.parallel.pipeline_parallel.schedule import Backward, BackwardInput, Forward
from megatron_med.plan.stage_model import StageModel


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
    """Group -> traffic of one step without validation and checkpoints. Axes that share a group are counted together."""
    axes = stage.groups
    sharded = stage.config.parallel.sharding == "full"
    by_axis = [
        ("tp", _tensor(stage)),
        ("pp", _pipeline(stage)),
        *(_fully_sharded(stage) if sharded else _bucketed(stage)).items(),
        ("loss", Traffic(1, 8)),  # tokens of the global batch
        ("embedding", _tied(stage)),
        ("world", Traffic(2, 8 + 16)),  # gradient norm; loss and stop flag
    ]
    traffic: dict[str, Traffic] = {}
    for axis, value in by_axis:
        if axes[axis].size > 1 and value.calls:
            label = axis_label(axes, axis) if axis in AXES else axis
            traffic[label] = traffic.get(label, Traffic()) + value
    return traffic


def _tensor(stage: StageModel) -> Traffic:
    total = Traffic()
    for trace in stage.traces:
        calls = round(trace.total(lambda layers: len(layers.collectives)))
        size = trace.total(lambda layers: sum(event.size for event in layers.collectives))
        total += Traffic(calls * stage.micro_batches, size * stage.micro_batches)
    partial = sum(held.shard for held in stage.state.trained if held.layout.partial_over_tp)
    return total + (Traffic(1, 4.0 * partial) if partial else Traffic())


def _pipeline(stage: StageModel) -> Traffic:
    """Hidden states to the next stage, gradients to the one before."""
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
    buckets = stage.state.buckets
    calls = len(buckets)
    if stage.config.parallel.sharding == "none":
        return {"loss": Traffic(calls, 4.0 * sum(bucket.elements for bucket in buckets))}
    shards = sum(bucket.shard for bucket in buckets)
    return {
        "fsdp": Traffic(2 * calls, (4.0 + stage.itemsize) * shards * stage.groups["fsdp"].size),
        "dp_replicate": Traffic(calls, 4.0 * shards),
    }


def _fully_sharded(stage: StageModel) -> dict[str, Traffic]:
    """Each layer's weights are gathered for every pass, its gradients cut after every backward pass; in a pipeline
    both once a step."""
    in_pipeline = stage.config.parallel.pipeline > 1
    ranks = stage.groups["fsdp"].size
    count = 1 if in_pipeline else stage.micro_batches
    sharded, replicated = Traffic(), Traffic()
    for units in stage.sharded_units:
        for unit in units:
            gathers = 1 if in_pipeline else count + unit.reshard_after_forward * count
            sharded += Traffic(gathers, float(unit.elements * stage.itemsize * gathers))
            if unit.trained:
                sharded += Traffic(count, 4.0 * unit.trained * count)
                replicated += Traffic(1, 4.0 * unit.trained / ranks)
    return {"fsdp": sharded, "dp_replicate": replicated}


def _tied(stage: StageModel) -> Traffic:
    """Embedding gradients of the first and the last stage."""
    pp, tied = stage.groups["pp"], stage.state.tied
    if not (pp.is_first or pp.is_last):
        return Traffic()
    return Traffic(1, 4.0 * tied) if tied else Traffic()
