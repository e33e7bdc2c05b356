"""What one pipeline stage holds: parameters, gradients, optimizer state and activations, in bytes per rank.

The stage is really built, on the meta device: its numbers are those of the code that will run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from megatron_med.config import Config
from megatron_med.config.layers import Chunk
from megatron_med.model.build import DTYPES, build_chunks
from megatron_med.model.recompute import Recompute
from megatron_med.model.transformer import Transformer
from megatron_med.parallel.buckets import BucketedDataParallel
from megatron_med.parallel.context import Axis, ParallelContext
from megatron_med.parallel.parameters import ParameterLayout, layout_of
from megatron_med.parallel.schedule import Action, Forward
from megatron_med.parallel.simulation import alive_during
from megatron_med.plan.pieces import ChunkCost

BATCH_BYTES = 3 * 8 + 4
"""Of a token on the device: token, label and position in int64, loss mask in fp32."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights: that the model computes with.
        gradients: fp32 sums, whole and in slices.
        optimizer: fp32 masters and both moments.
        activations: at the peak of the schedule.
        temporary: micro-batches, messages under way, gathered or travelling pieces.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporary


@dataclass(frozen=True)
class HeldParameter:
    """A tensor-parallel piece of a parameter, in elements.

    Attributes:
        whole: of the piece.
        slice: of the largest data-parallel slice of it.
    """

    layout: ParameterLayout
    whole: int
    slice: int


@dataclass(frozen=True)
class BuiltStage:
    """A stage on the meta device.

    Attributes:
        chunks: its pieces of the model, first to last.
        parameters: what one rank holds of each.
        ranks: that data-parallel slices are cut for.
        buckets: elements of each bucket, in the order of the forward pass; of one rank's slices too.
        weights, gradients, optimizer: bytes.
    """

    chunks: list[Chunk]
    parameters: list[HeldParameter]
    ranks: int
    buckets: list[tuple[int, int]]
    weights: float
    gradients: float
    optimizer: float

    @property
    def elements(self) -> int:
        """Parameters of one rank."""
        return sum(held.whole for held in self.parameters)

    @property
    def is_cut(self) -> bool:
        """Whether data-parallel ranks hold different slices."""
        return self.ranks > 1


def build_on_meta(config: Config, stage: int, dp_shard: Axis, dp_replicate: Axis) -> BuiltStage:
    """Builds a stage as the first of its tensor- and data-parallel ranks would, without memory."""
    parallel = config.parallel
    dp = Axis(dp_shard.size * dp_replicate.size)
    context = ParallelContext(
        device=torch.device("meta"),
        tp=Axis(parallel.tensor),
        pp=Axis(parallel.pipeline, stage),
        dp=dp,
        dp_shard=dp_shard,
        dp_replicate=dp_replicate,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor > 1,
    )
    dtype = DTYPES[config.precision]
    chunks = build_chunks(config.model, context, dtype, parallel, Recompute())
    ranks = 1 if parallel.sharding == "none" else dp_shard.size
    parameters = [_held(parameter, ranks) for parameter in chunks.parameters()]
    cut = [cast(Transformer, chunk).chunk for chunk in chunks]
    elements = sum(held.whole for held in parameters)
    owned = sum(held.slice for held in parameters)
    if parallel.sharding == "full":
        # FSDP2 sums the gradients of several backward passes whole where it does not cut them after each
        gradients = elements if parallel.pipeline > 1 else owned
        return BuiltStage(cut, parameters, ranks, [], 4.0 * owned, 4.0 * gradients, 8.0 * owned)
    data_parallel = BucketedDataParallel(chunks, context, shard=parallel.sharding == "optimizer")
    sizes = [(sum(p.numel() for p in bucket.parameters), bucket.row) for bucket in data_parallel.buckets]
    own_masters = [item.master for item in data_parallel.owned if not _same_memory(item.master, item.parameter)]
    return BuiltStage(
        cut,
        parameters,
        ranks,
        sizes,
        weights=sum(parameter.numel() * parameter.element_size() for parameter in chunks.parameters()),
        gradients=4.0 * elements + (4.0 * sum(row for _, row in sizes) if ranks > 1 else 0.0),
        optimizer=4.0 * sum(m.numel() for m in own_masters) + 8.0 * sum(i.master.numel() for i in data_parallel.owned),
    )


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _held(parameter: nn.Parameter, ranks: int) -> HeldParameter:
    layout = layout_of(parameter)
    length = parameter.shape[layout.dp_dim]
    return HeldParameter(layout, parameter.numel(), parameter.numel() // length * -(-length // ranks))


def peak_memory(
    config: Config,
    built: BuiltStage,
    costs: Sequence[ChunkCost],
    actions: Sequence[Action],
    waiting: Mapping[Action, int],
    micro_batches: int,
) -> Memory:
    """The largest memory of a step on one rank of a stage.

    Args:
        config: the run.
        built: the stage.
        costs: of each of its chunks.
        actions: its schedule.
        waiting: messages that it has sent and still keeps while an action runs.
        micro_batches: of one step, all on the device.
    """
    dtype = DTYPES[config.precision]
    kept = [int(cost.total(lambda piece: piece.kept)) for cost in costs]
    later = [int(cost.total(lambda piece: piece.kept_for_weights)) for cost in costs]
    forward = [cost.forward_excess for cost in costs]
    backward = [cost.backward_excess for cost in costs]
    hidden = costs[0].ends.hidden_bytes
    received_ahead = int(config.parallel.overlap.pipeline)
    activations, messages = 0.0, 0
    for action, alive in alive_during(actions, kept.__getitem__, later.__getitem__):
        here = alive + (forward if isinstance(action, Forward) else backward)[action.chunk]
        sent = 0 if config.parallel.pipeline == 1 else (waiting[action] + received_ahead) * hidden
        if here + sent > activations + messages:
            activations, messages = here, sent
    samples = micro_batches * config.train.micro_batch_size
    length = config.data.sequence_length
    batch = samples * length * (BATCH_BYTES + (length if config.data.isolate_documents else 0))
    if config.parallel.sharding == "full":
        layer = costs[-1].layers[-1].each(lambda piece: piece.kept)
        others = messages + _gathered_layers(config, built, dtype, layer, activations)
    else:
        reducing = _while_reducing(built, kept, backward)
        others = max(messages, reducing - activations, _published(built, dtype) - activations)
    return Memory(built.weights, built.gradients, built.optimizer, activations, batch + others)


def _while_reducing(built: BuiltStage, kept: Sequence[int], backward: Sequence[float]) -> float:
    """Activations and travelling buckets at the worst moment of a step's last backward passes: a bucket is on its way
    until the next one is complete, and as buckets complete, activations go."""
    if not built.is_cut:
        return 0.0
    total = sum(whole for whole, _ in built.buckets)
    worst, done, before = 0.0, 0, 0
    for whole, row in reversed(built.buckets):
        buffer = row * built.ranks
        done += whole
        left = max(kept) * (1 - done / total)
        worst = max(worst, left + max(backward) + 4.0 * (buffer + before))
        before = buffer
    return worst


def _published(built: BuiltStage, dtype: torch.dtype) -> float:
    """Updated weights on their way, before the first layer has waited for its own."""
    if not built.is_cut:
        return 0.0
    return float(dtype.itemsize * sum((built.ranks + 1) * row for _, row in built.buckets))


def _gathered_layers(
    config: Config, built: BuiltStage, dtype: torch.dtype, layer_kept: float, activations: float
) -> float:
    """FSDP2 holds whole: two layers and the chunk's own parameters; in a pipeline all of them, until their last
    backward pass. One layer's gradients travel in fp32 when its activations are gone, those of embedding and head
    when all are."""
    layers: dict[str, int] = {}
    others = 0
    for held in built.parameters:
        if held.layout.name.startswith("layers."):
            key = held.layout.name.split(".")[1]
            layers[key] = layers.get(key, 0) + held.whole
        else:
            others += held.whole
    largest = max(layers.values())
    whole = sum(layers.values()) if config.parallel.pipeline > 1 else min(2, len(layers)) * largest
    travelling = 4 + dtype.itemsize
    return dtype.itemsize * (whole + others) + max(
        0, travelling * largest - layer_kept, travelling * others - activations
    )
