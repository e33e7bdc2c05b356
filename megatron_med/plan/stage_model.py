"""What a plan knows of one pipeline stage: what a rank of it holds, what it runs, and with whom it talks.

The stage is really built, on the meta device, and its passes are traces of the code that will run. Memory, traffic and
time are read from this one model (``memory.py``, ``traffic.py``, ``step_time.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from megatron_med.config import Config
from megatron_med.config.layers import Chunk
from megatron_med.config.schema import OptimizerConfig
from megatron_med.kernels.blockwise import blocks_of
from megatron_med.model.build import DTYPES, build_chunks
from megatron_med.model.lora import add_adapters
from megatron_med.model.recompute import Recompute
from megatron_med.model.transformer import Transformer
from megatron_med.optim.adamw8bit import in_8_bit
from megatron_med.optim.groups import freeze_groups
from megatron_med.parallel.context import AXES, Axis, ParallelContext, RankGrid
from megatron_med.parallel.data_parallel.buckets import BucketedDataParallel
from megatron_med.parallel.parameters import ParameterLayout, layout_of
from megatron_med.parallel.pipeline_parallel.schedule import GENERATORS, Action, Forward, Schedule
from megatron_med.parallel.tensor_parallel.quantized import quantized_weights
from megatron_med.plan.cluster import Cluster
from megatron_med.plan.layer_trace import ChunkTrace, shape_of, trace_chunk


@dataclass(frozen=True)
class HeldParameter:
    """A tensor-parallel shard of a parameter, in elements.

    Attributes:
        elements: of the shard.
        shard: of the largest data-parallel shard of it.
    """

    layout: ParameterLayout
    elements: int
    shard: int


@dataclass(frozen=True)
class GradientBucket:
    """Gradients that are reduced in one call, in elements.

    Attributes:
        elements: of all of them.
        shard: that one data-parallel rank keeps, padded.
    """

    elements: int
    shard: int


@dataclass(frozen=True)
class ShardedUnit:
    """What FSDP2 gathers in one call.

    Attributes:
        elements: padded to the ranks.
        trained: of these, the ones whose gradients are cut.
        reshard_after_forward: gathered again for the backward pass; the unit of embedding, norm and head is not.
    """

    elements: int
    trained: int
    reshard_after_forward: bool


@dataclass(frozen=True)
class StageState:
    """What one rank of a stage holds before any micro-batch comes, and with whom it talks.

    Attributes:
        groups: the axes of one of its ranks, without process groups. Of each kind the group that is spread over the
            most nodes, for all groups wait for the slowest.
        chunks: the stage's parts of the model, first to last.
        parameters: what one rank holds of each.
        shards: data-parallel ranks that hold different shards.
        buckets: in the order of the forward pass; none under FSDP2.
        weights, gradients, optimizer: bytes.
    """

    groups: Mapping[str, Axis]
    chunks: list[Chunk]
    parameters: list[HeldParameter]
    shards: int
    buckets: list[GradientBucket]
    weights: float
    gradients: float
    optimizer: float

    @property
    def elements(self) -> int:
        """Parameters of one rank."""
        return sum(held.elements for held in self.parameters)

    @property
    def trained(self) -> list[HeldParameter]:
        """Parameters that are not frozen."""
        return [held for held in self.parameters if held.layout.trained]

    @property
    def owned(self) -> int:
        """Parameters that one rank updates."""
        return sum(held.shard for held in self.trained)

    @property
    def tied(self) -> int:
        """Owned parameters whose gradients the first and the last stage sum."""
        return sum(held.shard for held in self.trained if held.layout.shared)

    @property
    def is_sharded(self) -> bool:
        """Whether data-parallel ranks hold different slices."""
        return self.shards > 1


@dataclass(frozen=True)
class StageModel:
    """One pipeline stage of a run; its tensor- and data-parallel ranks are alike.

    Attributes:
        config: the run.
        state: of one rank.
        traces: one micro-batch through each of its chunks.
        actions: of one step, in order.
    """

    config: Config
    state: StageState
    traces: list[ChunkTrace]
    actions: list[Action]

    @property
    def groups(self) -> Mapping[str, Axis]:
        """The axes of one of its ranks by name."""
        return self.state.groups

    @property
    def index(self) -> int:
        """Place of the stage in the pipeline, from 0."""
        return self.groups["pp"].rank

    @property
    def itemsize(self) -> int:
        """Bytes of an element that the model computes with."""
        return DTYPES[self.config.precision].itemsize

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a micro-batch's hidden states between two stages."""
        return self.traces[0].ends.hidden_bytes

    @cached_property
    def micro_batches(self) -> int:
        """Micro-batches that go through every chunk in a step."""
        return sum(isinstance(action, Forward) and action.chunk == 0 for action in self.actions)

    @cached_property
    def sharded_units(self) -> list[list[ShardedUnit]]:
        """For each chunk its layers and what is around them, as FSDP2 gathers them."""
        return [self._units_of(chunk) for chunk in self.state.chunks]

    def _units_of(self, own: Chunk) -> list[ShardedUnit]:
        layers: dict[str, list[HeldParameter]] = {str(layer): [] for layer in own.layers}
        around: list[HeldParameter] = []
        for held in self.state.parameters:
            kind, *rest = held.layout.name.split(".")
            if kind == "layers" and rest[0] in layers:
                layers[rest[0]].append(held)
            elif (kind == "embedding" and own.is_first) or (kind not in ("layers", "embedding") and own.is_last):
                around.append(held)
        units = [self._unit(parameters, reshard_after_forward=True) for parameters in layers.values()]
        return units + ([self._unit(around, reshard_after_forward=False)] if around else [])

    def _unit(self, parameters: list[HeldParameter], reshard_after_forward: bool) -> ShardedUnit:
        ranks = self.groups["fsdp"].size
        trained = sum(held.shard for held in parameters if held.layout.trained)
        return ShardedUnit(sum(held.shard for held in parameters) * ranks, trained * ranks, reshard_after_forward)


def model_stages(config: Config, states: list[StageState]) -> list[StageModel]:
    """Adds the traces of every chunk and the schedule to the states of all stages."""
    parallel, train = config.parallel, config.train
    shape = shape_of(config)
    trained = {held.layout.name: held.layout.trained for state in states for held in state.parameters}
    micro_batches = train.global_batch_size // (train.micro_batch_size * states[0].groups["batch"].size)
    schedule: Schedule = GENERATORS[parallel.schedule](parallel.pipeline, micro_batches, parallel.virtual_stages)
    return [
        StageModel(config, state, [trace_chunk(shape, chunk, trained) for chunk in state.chunks], actions)
        for state, actions in zip(states, schedule, strict=True)
    ]


def build_states(config: Config, cluster: Cluster) -> list[StageState]:
    """Builds every stage on the meta device, as a rank of the cluster would. No size of micro-batch matters here."""
    return [_build(config, stage, _groups(config, cluster, stage)) for stage in range(config.parallel.pipeline)]


def _groups(config: Config, cluster: Cluster, stage: int) -> dict[str, Axis]:
    parallel = config.parallel
    grid = RankGrid(parallel, cluster.world_size)
    own = set(grid.ranks[stage].flatten().tolist())

    def most_spread(lines: list[list[int]], rank: int = 0) -> Axis:
        ranks = max(lines, key=lambda line: len({one // cluster.gpus_per_node for one in line}))
        return Axis(len(ranks), rank, tuple(ranks))

    axes = {
        name: most_spread([line for line in grid.lines(*dims) if own.intersection(line)]) for name, dims in AXES.items()
    }
    is_end = parallel.pipeline > 1 and stage in (0, parallel.pipeline - 1)
    return axes | {
        "pp": most_spread(grid.lines("pp"), stage),
        "embedding": most_spread(grid.ends_of_pipelines(), int(stage > 0)) if is_end else Axis(),
        "world": most_spread([list(range(cluster.world_size))]),
    }


def _build(config: Config, stage: int, groups: Mapping[str, Axis]) -> StageState:
    """Builds a stage as the first of its tensor- and data-parallel ranks would, without memory."""
    parallel = config.parallel
    axes: dict[str, Any] = dict(groups)
    sequence_parallel = parallel.sequence_parallel and parallel.tensor > 1
    context = ParallelContext(torch.device("meta"), **axes, sequence_parallel=sequence_parallel)
    dtype = DTYPES[config.precision]
    chunks = build_chunks(config.model, context, dtype, parallel, Recompute(), config.quantize)
    add_adapters(chunks, config.model, config.lora)
    freeze_groups(chunks, config.optimizer.groups)
    shards = 1 if parallel.sharding == "none" else context.fsdp.size
    parameters = [_held(parameter, shards) for parameter in chunks.parameters()]
    layers = [cast(Transformer, chunk).chunk for chunk in chunks]
    elements = sum(held.elements for held in parameters if held.layout.trained)
    quantized = sum(_bytes(buffer) for weight in quantized_weights(chunks) for buffer in weight.buffers())
    moments = sum(_moment_bytes(held, config.optimizer) for held in parameters if held.layout.trained)
    if parallel.sharding == "full":
        owned = sum(held.shard for held in parameters if held.layout.trained)
        frozen = sum(held.shard for held in parameters if not held.layout.trained)
        weights = 4.0 * owned + dtype.itemsize * frozen + quantized
        # FSDP2 sums the gradients of several backward passes whole where it does not cut them after each
        gradients = elements if parallel.pipeline > 1 else owned
        return StageState(groups, layers, parameters, shards, [], weights, 4.0 * gradients, moments)
    data_parallel = BucketedDataParallel(chunks, context, shard=parallel.sharding == "optimizer")
    buckets = [GradientBucket(sum(p.numel() for p in b.parameters), b.row) for b in data_parallel.buckets]
    own_masters = [item.master for item in data_parallel.owned if not _same_memory(item.master, item.parameter)]
    return StageState(
        groups,
        layers,
        parameters,
        shards,
        buckets,
        weights=sum(map(_bytes, chunks.parameters())) + quantized,
        gradients=4.0 * elements + (4.0 * sum(bucket.shard for bucket in buckets) if shards > 1 else 0.0),
        optimizer=4.0 * sum(m.numel() for m in own_masters) + moments,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _moment_bytes(held: HeldParameter, optimizer: OptimizerConfig) -> float:
    """Of both moments of one rank's slice."""
    if not in_8_bit(held.layout, optimizer):
        return 8.0 * held.shard
    return 2.0 * (held.shard + 4 * blocks_of(held.shard))


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _held(parameter: nn.Parameter, shards: int) -> HeldParameter:
    layout = layout_of(parameter)
    length = parameter.shape[layout.dp_dim]
    return HeldParameter(layout, parameter.numel(), parameter.numel() // length * -(-length // shards))
