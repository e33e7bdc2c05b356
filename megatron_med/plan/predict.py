"""The plan of a run: memory of every stage, traffic of every group, time of a step, before any machine is booked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from megatron_med.config import Config
from megatron_med.model.build import DTYPES
from megatron_med.model.flops import (
    hardware_flops_per_token,
    parameter_count,
    parameter_flops_per_token,
    training_flops_per_token,
)
from megatron_med.model.recompute import Recompute
from megatron_med.parallel.context import Axis
from megatron_med.parallel.schedule import GENERATORS, Action, BackwardInput, BackwardWeight, Forward, Schedule
from megatron_med.parallel.simulation import Simulation, Waits, messages_waiting, simulate
from megatron_med.parallel.trace import Trace
from megatron_med.plan.cluster import Cluster
from megatron_med.plan.exposed import beside_gathers, data_parallel_seconds, unit_gathers, unit_reductions
from megatron_med.plan.pieces import ChunkCost, chunk_cost, fake_world, shape_of
from megatron_med.plan.price import Pricer, Software
from megatron_med.plan.stage import BuiltStage, Memory, build_on_meta, peak_memory
from megatron_med.plan.traffic import Traffic, stage_traffic


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage; all of its ranks are alike.

    Attributes:
        ranks: first and last rank.
        layers: of the model.
        parameters: of one rank.
        memory: of one rank at its peak.
        traffic: of one rank and step.
        forward_seconds, backward_seconds: of one micro-batch through all of its chunks.
        tensor_seconds: of these, waiting for tensor-parallel collectives.
    """

    ranks: tuple[int, int]
    layers: list[int]
    parameters: int
    memory: Memory
    traffic: dict[str, Traffic]
    forward_seconds: float
    backward_seconds: float
    tensor_seconds: float


@dataclass(frozen=True)
class Plan:
    """What a configuration costs on a cluster.

    Attributes:
        parameters: of the model, over the true vocabulary.
        stages: first to last.
        fits: every stage does.
        bubble: share of the pipeline's time in which stages stand still.
        pipeline_seconds: from the first forward to the last backward pass.
        data_parallel_seconds: exposed reduction of gradients and gathering of weights.
        optimizer_seconds: clipping and update.
        step_seconds: all of it.
        tokens_per_second: of the whole cluster.
        mfu: 6 x parameters x tokens / peak.
        mfu_with_attention: with the causal half of attention, without the embedding.
        hardware_share: operations that run, recomputation and all pairs of attention included, / peak.
    """

    config: Config
    cluster: Cluster
    software: Software
    parameters: int
    stages: list[StagePlan]
    micro_batches: int
    bubble: float
    pipeline_seconds: float
    data_parallel_seconds: float
    optimizer_seconds: float
    tokens_per_second: float
    mfu: float
    mfu_with_attention: float
    hardware_share: float

    @property
    def fits(self) -> bool:
        return all(stage.memory.total <= self.cluster.usable_memory for stage in self.stages)

    @property
    def step_seconds(self) -> float:
        return self.pipeline_seconds + self.data_parallel_seconds + self.optimizer_seconds

    @property
    def hardware_flops(self) -> float:
        """FLOP/s of one device as SC21 counts them."""
        return self.hardware_share * self.cluster.accelerator.peak_flops


@dataclass(frozen=True)
class Layout:
    """Everything about a run that costs no simulation: its stages, their pieces and its groups."""

    built: list[BuiltStage]
    costs: list[list[ChunkCost]]
    axes: list[dict[str, Axis]]
    schedule: Schedule
    micro_batches: int


def plan(config: Config, cluster: Cluster, software: Software | None = None) -> Plan:
    """Plans a valid configuration on a cluster."""
    with fake_world():
        layout = lay_out(config, build_stages(config, cluster))
    times = StageTimes(config, Prices(cluster, software or Software()), layout)
    return predict(times, stage_memories(config, layout))


@dataclass(frozen=True)
class Stages:
    """Every stage of a configuration on the meta device, and the axes of its first rank."""

    built: list[BuiltStage]
    axes: list[dict[str, Axis]]


def build_stages(config: Config, cluster: Cluster) -> Stages:
    """Builds every stage on the meta device."""
    stages = range(config.parallel.pipeline)
    axes = [stage_axes(config, cluster, stage) for stage in stages]
    built = [build_on_meta(config, stage, axes[stage]["dp_shard"], axes[stage]["dp_replicate"]) for stage in stages]
    return Stages(built, axes)


def lay_out(config: Config, stages: Stages) -> Layout:
    """Traces the pieces of every chunk, and makes the schedule."""
    parallel, train = config.parallel, config.train
    built, axes = stages.built, stages.axes
    shape = shape_of(config)
    costs = [[chunk_cost(shape, chunk) for chunk in stage.chunks] for stage in built]
    micro_batches = train.global_batch_size // (train.micro_batch_size * axes[0]["dp"].size)
    schedule = GENERATORS[parallel.schedule](parallel.pipeline, micro_batches, parallel.virtual_stages)
    return Layout(built, costs, axes, schedule, micro_batches)


def stage_memories(config: Config, layout: Layout) -> list[Memory]:
    """Peak memory of one rank of each stage. After as many micro-batches as a pipeline has places the schedule repeats
    itself, but for gpipe, which keeps them all."""
    few = layout.micro_batches
    if config.parallel.schedule != "gpipe":
        few = min(few, 2 * config.parallel.pipeline * config.parallel.virtual_stages)
    parallel = config.parallel
    schedule, waiting = _schedule_and_messages(
        parallel.schedule, len(layout.built), few, parallel.virtual_stages, int(parallel.overlap.pipeline)
    )
    return [
        peak_memory(config, built, costs, actions, waits, layout.micro_batches)
        for built, costs, actions, waits in zip(layout.built, layout.costs, schedule, waiting, strict=True)
    ]


@cache
def _schedule_and_messages(
    name: str, stages: int, micro_batches: int, chunks: int, ahead: int
) -> tuple[Schedule, list[dict[Action, int]]]:
    schedule = GENERATORS[name](stages, micro_batches, chunks)
    return schedule, messages_waiting(schedule, simulate(schedule), ahead)


def predict(times: StageTimes, memories: list[Memory]) -> Plan:
    """Adds times and traffic to the memories."""
    config, layout, cluster = times.config, times.layout, times.prices.cluster
    simulation = simulate_step(times)
    communication, optimizer = data_parallel_seconds(config, layout.built, times.pricers, layout.axes, simulation)
    step = simulation.makespan + communication + optimizer
    length = config.data.sequence_length
    tokens = config.train.global_batch_size * length / step
    peak = cluster.world_size * cluster.accelerator.peak_flops
    recompute = Recompute(config.recompute, config.recompute_interval)
    recomputed = sum(map(recompute.whole_layer, range(config.model.num_layers)))
    ranks_per_stage = cluster.world_size // len(layout.built)
    stages = [
        StagePlan(
            ranks=(stage * ranks_per_stage, (stage + 1) * ranks_per_stage - 1),
            layers=[layer for chunk in built.chunks for layer in chunk.layers],
            parameters=built.elements,
            memory=memories[stage],
            traffic=stage_traffic(config, built, layout.costs[stage], layout.schedule[stage], layout.axes[stage]),
            forward_seconds=sum(times.forward(stage, chunk) for chunk in range(len(built.chunks))),
            backward_seconds=sum(times.backward(stage, chunk) for chunk in range(len(built.chunks))),
            tensor_seconds=sum(times.tensor(stage, chunk) for chunk in range(len(built.chunks))),
        )
        for stage, built in enumerate(layout.built)
    ]
    return Plan(
        config=config,
        cluster=cluster,
        software=times.prices.software,
        parameters=parameter_count(config.model),
        stages=stages,
        micro_batches=layout.micro_batches,
        bubble=simulation.bubble_share,
        pipeline_seconds=simulation.makespan,
        data_parallel_seconds=communication,
        optimizer_seconds=optimizer,
        tokens_per_second=tokens,
        mfu=tokens * parameter_flops_per_token(config.model) / peak,
        mfu_with_attention=tokens * training_flops_per_token(config.model, length) / peak,
        hardware_share=tokens * hardware_flops_per_token(config.model, length, recomputed) / peak,
    )


class Prices:
    """Seconds of traces on a cluster, each computed once."""

    def __init__(self, cluster: Cluster, software: Software) -> None:
        self.cluster = cluster
        self.software = software
        self._known: dict[tuple[int, tuple[float, float], bool], float] = {}

    def pricer(self, config: Config, axes: dict[str, Axis]) -> Pricer:
        """Prices events on the ranks of a stage."""
        groups = {name: axis.ranks for name, axis in axes.items()}
        return Pricer(self.cluster, self.software, DTYPES[config.precision].itemsize, groups)

    def seconds(self, trace: Trace | None, pricer: Pricer, free: bool) -> float:
        """Seconds of a trace; traces live as long as the process."""
        if trace is None:
            return 0.0
        key = id(trace), self.cluster.bandwidth(pricer.groups["tp"]), free
        if key not in self._known:
            self._known[key] = pricer.seconds(trace, free_collectives=free)
        return self._known[key]


class StageTimes:
    """Seconds of the passes of every chunk."""

    def __init__(self, config: Config, prices: Prices, layout: Layout) -> None:
        self.config = config
        self.prices = prices
        self.layout = layout
        self.pricers = [prices.pricer(config, axes) for axes in layout.axes]
        self._known: dict[tuple[str, int, int, bool], float] = {}

    def __call__(self, stage: int, action: Action) -> float:
        if isinstance(action, Forward):
            return self.forward(stage, action.chunk)
        if isinstance(action, BackwardWeight):
            return self._price("weight_products", stage, action.chunk)
        if isinstance(action, BackwardInput):
            return self._price("backward", stage, action.chunk)
        return self.backward(stage, action.chunk)

    def forward(self, stage: int, chunk: int) -> float:
        compute = self._price("forward", stage, chunk)
        return beside_gathers(compute, self._gathers(stage, chunk), (), self.pricers[stage])

    def backward(self, stage: int, chunk: int) -> float:
        """The whole backward pass, its weight part included."""
        split = self.config.parallel.schedule == "zero_bubble"
        compute = self._price("backward", stage, chunk)
        compute += self._price("weight_products", stage, chunk) if split else 0.0
        gathers = self._gathers(stage, chunk)
        if not gathers:
            return compute
        layout = self.layout
        reductions = unit_reductions(layout.built[stage], chunk, self.pricers[stage], layout.axes[stage])
        return beside_gathers(compute, gathers, reductions, self.pricers[stage])

    def _gathers(self, stage: int, chunk: int) -> list[float]:
        """Of a pass under FSDP2 without pipeline; in a pipeline weights are gathered once a step."""
        if self.config.parallel.sharding != "full" or self.config.parallel.pipeline > 1:
            return []
        layout = self.layout
        return unit_gathers(self.config, layout.built[stage], chunk, self.pricers[stage], layout.axes[stage])

    def tensor(self, stage: int, chunk: int) -> float:
        """Seconds of both passes that tensor-parallel collectives cost."""
        parts = ["forward", "backward"]
        if self.config.parallel.schedule == "zero_bubble":
            parts.append("weight_products")
        return sum(self._price(part, stage, chunk) - self._price(part, stage, chunk, free=True) for part in parts)

    def _price(self, part: str, stage: int, chunk: int, free: bool = False) -> float:
        key = part, stage, chunk, free
        if key not in self._known:
            cost, pricer = self.layout.costs[stage][chunk], self.pricers[stage]
            self._known[key] = cost.total(lambda piece: self.prices.seconds(getattr(piece, part), pricer, free))
        return self._known[key]


def simulate_step(times: StageTimes) -> Simulation:
    """The schedule with the times of every stage and message."""
    config, layout = times.config, times.layout
    stages = len(layout.built)
    transfers = [0.0] * stages
    if stages > 1:
        size = layout.costs[0][0].ends.hidden_bytes
        for stage in range(stages):
            ranks = layout.axes[stage]["pp"].ranks
            pair = (ranks[stage], ranks[(stage + 1) % stages])
            transfers[stage] = times.pricers[stage].transfer("send", size, pair)
    waits: Waits = "none" if config.parallel.overlap.pipeline else "receiver"
    if times.prices.software.messages == "blocking":
        waits = "sender"
    return simulate(layout.schedule, durations=times, transfers=transfers, waits=waits)


def stage_axes(config: Config, cluster: Cluster, stage: int) -> dict[str, Axis]:
    """Axes of a stage, without process groups: of each kind the group that is spread over the most nodes, for all
    groups wait for the slowest."""
    parallel = config.parallel
    tensor, world_size = parallel.tensor, cluster.world_size
    dp = world_size // (tensor * parallel.pipeline)
    grid = torch.arange(world_size).view(parallel.pipeline, parallel.replicate, dp // parallel.replicate, tensor)
    own = grid[stage]

    def worst(groups: torch.Tensor, rank: int = 0) -> Axis:
        """Of ``[groups, ranks]``."""
        lines = groups.tolist()
        ranks = max(lines, key=lambda line: len({one // cluster.gpus_per_node for one in line}))
        return Axis(len(ranks), rank, tuple(ranks))

    pipelines = grid.flatten(1).t()
    ends = pipelines[:, [0, -1]] if parallel.pipeline > 1 else pipelines
    is_end = stage in (0, parallel.pipeline - 1)
    return {
        "tp": worst(own.flatten(0, 1)),
        "dp_shard": worst(own.movedim(1, -1).flatten(0, 1)),
        "dp_replicate": worst(own.movedim(0, -1).flatten(0, 1)),
        "dp": worst(own.flatten(0, 1).t()),
        "pp": worst(pipelines, stage),
        "embedding": worst(ends, int(stage > 0)) if is_end else Axis(),
        "world": worst(grid.reshape(1, -1)),
    }
