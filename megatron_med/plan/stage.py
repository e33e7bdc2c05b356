"""What one pipeline stage holds: parameters, gradients, optimizer state and activations, in bytes per rank.

The stage is really built, on the meta device: its numbers are those of the code that will run.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        buckets: elements of each bucket, in the order of the forward pass; of one rank's slices too.
        weights, gradients, optimizer: bytes.
    """

    chunks: list[Chunk]
    parameters: list[HeldParameter]
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
        return any(held.slice != held.whole for held in self.parameters)


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
        return BuiltStage(cut, parameters, [], 4.0 * owned, 4.0 * owned, 8.0 * owned)
    data_parallel = BucketedDataParallel(chunks, context, shard=parallel.sharding == "optimizer")
    sizes = [(sum(p.numel() for p in bucket.parameters), bucket.row) for bucket in data_parallel.buckets]
    own_masters = [item.master for item in data_parallel.owned if not _same_memory(item.master, item.parameter)]
    return BuiltStage(
        cut,
        parameters,
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
    config: Config, built: BuiltStage, costs: Sequence[ChunkCost], actions: Sequence[Action], micro_batches: int
) -> Memory:
    """The largest memory of a step on one rank of a stage.

    Args:
        config: the run.
        built: the stage.
        costs: of each of its chunks.
        actions: its schedule.
        micro_batches: of one step, all on the device.
    """
    dtype = DTYPES[config.precision]
    kept = [int(cost.total(lambda piece: piece.kept)) for cost in costs]
    forward = [cost.largest(lambda piece: piece.forward_excess) for cost in costs]
    backward = [cost.largest(lambda piece: piece.backward_excess) for cost in costs]
    activations = max(
        alive + (forward if isinstance(action, Forward) else backward)[action.chunk]
        for action, alive in alive_during(actions, lambda chunk: kept[chunk])
    )
    samples = micro_batches * config.train.micro_batch_size
    length = config.data.sequence_length
    batch = samples * length * (BATCH_BYTES + (length if config.data.isolate_documents else 0))
    messages = 0
    if config.parallel.pipeline > 1:  # one is sent while the next is awaited
        messages = (1 + config.parallel.overlap.pipeline) * costs[0].ends.hidden_bytes
    if config.parallel.sharding == "full":
        travelling = _gathered_layers(config, built, dtype)
    else:
        travelling = _travelling_buckets(built)
    published = _published(built, dtype)
    temporary = batch + max(messages + travelling, published - activations)
    return Memory(built.weights, built.gradients, built.optimizer, activations, temporary)


def _travelling_buckets(built: BuiltStage) -> float:
    """Two gradient buckets on their way, where they are cut."""
    if not built.is_cut:
        return 0.0
    largest = sorted((whole for whole, _ in built.buckets), reverse=True)[:2]
    return 4.0 * sum(largest)


def _published(built: BuiltStage, dtype: torch.dtype) -> float:
    """Updated weights on their way, before the first layer has waited for its own."""
    if not built.is_cut:
        return 0.0
    return float(dtype.itemsize * sum(whole + row for whole, row in built.buckets))


def _gathered_layers(config: Config, built: BuiltStage, dtype: torch.dtype) -> float:
    """FSDP2 holds whole: two layers and the chunk's own parameters; in a pipeline all of them, until their last
    backward pass. One layer's gradients travel in fp32."""
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
    return dtype.itemsize * (whole + others) + (4 + dtype.itemsize) * max(largest, others)
