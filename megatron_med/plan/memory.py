"""The largest memory of a step on one rank of each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from megatron_med.parallel.pipeline_parallel.schedule import GENERATORS, Action, Forward
from megatron_med.parallel.pipeline_parallel.simulation import alive_during, messages_waiting, simulate
from megatron_med.plan.layer_trace import ChunkTrace
from megatron_med.plan.stage_model import StageModel

BATCH_BYTES = 3 * 8 + 4
"""Of a token on the device: token, label and position in int64, loss mask in fp32."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights: that the model computes with.
        gradients: fp32 sums, whole and in shards.
        optimizer: fp32 masters and both moments.
        activations: at the peak of the schedule.
        temporary: micro-batches, messages under way, gathered or travelling buckets.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporary


def peak_memories(stages: list[StageModel]) -> list[Memory]:
    """Peak memory of one rank of each stage, in bytes."""
    config = stages[0].config
    parallel = config.parallel
    micro_batches = stages[0].micro_batches
    if parallel.schedule != "gpipe":
        # After as many micro-batches as a pipeline has places the schedule repeats itself; gpipe keeps them all.
        micro_batches = min(micro_batches, 2 * parallel.pipeline * parallel.virtual_stages)
    waiting = _messages_waiting(
        parallel.schedule, len(stages), micro_batches, parallel.virtual_stages, int(parallel.overlap.pipeline)
    )
    return [_peak_memory(stage, messages) for stage, messages in zip(stages, waiting, strict=True)]


@cache
def _messages_waiting(
    schedule_name: str, stages: int, micro_batches: int, chunks: int, ahead: int
) -> list[dict[Action, int]]:
    schedule = GENERATORS[schedule_name](stages, micro_batches, chunks)
    return messages_waiting(schedule, simulate(schedule), ahead)


def _peak_memory(stage: StageModel, messages: Mapping[Action, int]) -> Memory:
    """The largest sum of all that one rank holds while some action of the step runs.

    Args:
        stage: any.
        messages: its actions in order, with the messages that it has sent and still keeps while each runs.
    """
    config, state = stage.config, stage.state
    activations, sent = _at_peak(stage, messages, lambda trace: trace.backward_excess)
    # All micro-batches of a step are on the device.
    samples = stage.micro_batches * config.train.micro_batch_size
    batch = samples * config.data.sequence_length * BATCH_BYTES
    if config.parallel.sharding == "full":
        in_layers, sent_there = _at_peak(stage, messages, lambda trace: trace.layers_backward_excess)
        moments = [
            (in_layers, sent_there + _gathered_layers(stage, in_layers)),
            (activations, sent + _gathered_at_the_head(stage)),
        ]
        activations, others = max(moments, key=sum)
    else:
        # Travelling buckets and gathered weights peak at other moments than activations: only what rises above counts.
        others = max(sent, _while_reducing(stage) - activations, _gathered_weights(stage) - activations)
    return Memory(state.weights, state.gradients, state.optimizer, activations, batch + others)


def _at_peak(
    stage: StageModel, messages: Mapping[Action, int], backward_excess: Callable[[ChunkTrace], float]
) -> tuple[float, float]:
    """Activations and messages at the worst moment of a step."""
    config, traces = stage.config, stage.traces
    alive = alive_during(list(messages), lambda chunk: traces[chunk].kept, lambda chunk: traces[chunk].kept_for_weights)
    # One message more is received ahead of time.
    received_ahead = int(config.parallel.overlap.pipeline)
    activations, sent = 0.0, 0
    for action, kept in alive:
        trace = traces[action.chunk]
        here = kept + (trace.forward_excess if isinstance(action, Forward) else backward_excess(trace))
        waiting = 0
        if config.parallel.pipeline > 1:
            waiting = (messages[action] + received_ahead) * stage.hidden_bytes
        if here + waiting > activations + sent:
            activations, sent = here, waiting
    return activations, sent


def _while_reducing(stage: StageModel) -> float:
    """Activations and travelling buckets at the worst moment of a step's last backward passes: a bucket is on its way
    until the next one is complete, and as buckets complete, activations go."""
    state, traces = stage.state, stage.traces
    if not state.is_sharded:
        return 0.0
    total = sum(bucket.elements for bucket in state.buckets)
    kept, excess = max(trace.kept for trace in traces), max(trace.backward_excess for trace in traces)
    worst, done, before = 0.0, 0, 0
    for bucket in reversed(state.buckets):
        buffer = bucket.shard * state.shards
        done += bucket.elements
        left = kept * (1 - done / total)
        worst = max(worst, left + excess + 4.0 * (buffer + before))
        before = buffer
    return worst


def _gathered_weights(stage: StageModel) -> float:
    """Updated weights on their way, before the first layer has waited for its own."""
    state = stage.state
    if not state.is_sharded:
        return 0.0
    return float(stage.itemsize * sum((state.shards + 1) * bucket.shard for bucket in state.buckets))


def _whole_units(stage: StageModel, only_trained: bool = False) -> tuple[list[int], int]:
    """Elements of each layer, and of what is around the layers."""
    units: dict[str, int] = {}
    for parameter in stage.state.parameters:
        kind, *rest = parameter.layout.name.split(".")
        unit = rest[0] if kind == "layers" else ""
        units[unit] = units.get(unit, 0) + parameter.elements * (parameter.layout.trained or not only_trained)
    around = units.pop("", 0)
    return list(units.values()), around


def _gathered_at_the_head(stage: StageModel) -> float:
    """What FSDP2 holds whole before the first layer's backward pass: the chunk's own parameters; in a pipeline all."""
    layers, around = _whole_units(stage)
    return float(stage.itemsize * (around + (sum(layers) if stage.config.parallel.pipeline > 1 else 0)))


def _gathered_layers(stage: StageModel, activations: float) -> float:
    """FSDP2 holds whole: one layer and the buffer that the next is gathered in, gradients of a layer, and the chunk's
    own parameters; in a pipeline all of them, until their last backward pass. One layer's gradients travel in fp32 when
    its activations are gone, those of embedding and head when all are."""
    layers, around = _whole_units(stage)
    travelling, around_travelling = _whole_units(stage, only_trained=True)
    in_pipeline = stage.config.parallel.pipeline > 1
    whole = sum(layers) if in_pipeline else min(2, len(layers)) * max(layers) + max(travelling)
    layer_kept = stage.traces[-1].layers[-1].each(lambda trace: trace.kept)
    if not stage.state.trained:
        # No backward pass: the peak is in the forward one, where a layer's buffer is let go of by the next layer.
        return float(stage.itemsize * (whole + around + max(layers)))
    bytes_travelling = 4 + stage.itemsize
    return stage.itemsize * (whole + around) + max(
        0,
        bytes_travelling * max(travelling) - layer_kept,
        bytes_travelling * around_travelling - activations,
    )
