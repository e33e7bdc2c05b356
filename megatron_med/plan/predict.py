"""The plan of a run: memory of every stage, traffic of every group, time of a step, before any machine is booked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_med.config import Config
from megatron_med.model.build import DTYPES
from megatron_med.model.flops import (
    hardware_flops_per_token,
    parameter_count,
    parameter_flops_per_token,
    training_flops_per_token,
)
from megatron_med.model.recompute import Recompute
from megatron_med.optim.groups import check_groups
from megatron_med.plan.cluster import Cluster
from megatron_med.plan.cost_model import CostModel, KernelAssumptions
from megatron_med.plan.exposed_comm import exposed_seconds
from megatron_med.plan.layer_trace import fake_world
from megatron_med.plan.memory import Memory, peak_memories
from megatron_med.plan.stage_model import StageModel, build_states, model_stages
from megatron_med.plan.step_time import (
    backward_seconds,
    forward_seconds,
    optimizer_seconds,
    simulate_step,
    tensor_seconds,
)
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
    kernels: KernelAssumptions
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


def plan(config: Config, cluster: Cluster, kernels: KernelAssumptions | None = None, *, device: str = "cuda") -> Plan:
    """Plans a valid configuration on a cluster, with the kernels that serve on ``device`` (``cpu``, ``cuda``)."""
    check_groups(config.model, config.optimizer.groups, config.lora)
    with fake_world(device):
        stages = model_stages(config, build_states(config, cluster))
    cost = CostModel(cluster, kernels or KernelAssumptions(), DTYPES[config.precision].itemsize)
    return predict(stages, peak_memories(stages), cost)


def predict(stages: list[StageModel], memories: list[Memory], cost: CostModel) -> Plan:
    """Adds times and traffic to the memories."""
    config, cluster = stages[0].config, cost.cluster
    # Time: the schedule with the times of its passes, then what nothing hides, then the update.
    simulation = simulate_step(stages, cost)
    communication, optimizer = exposed_seconds(stages, cost, simulation), optimizer_seconds(stages, cost)
    step = simulation.makespan + communication + optimizer
    # Speed: what the model needs in this time, as a share of what the cluster could do.
    length = config.data.sequence_length
    tokens = config.train.global_batch_size * length / step
    peak = cluster.world_size * cluster.accelerator.peak_flops
    recompute = Recompute(config.recompute, config.recompute_interval)
    recomputed = sum(map(recompute.whole_layer, range(config.model.num_layers)))
    ranks_per_stage = cluster.world_size // len(stages)
    return Plan(
        config=config,
        cluster=cluster,
        kernels=cost.kernels,
        parameters=parameter_count(config.model),
        stages=[
            _plan_stage(stage, memory, cost, ranks_per_stage) for stage, memory in zip(stages, memories, strict=True)
        ],
        micro_batches=stages[0].micro_batches,
        bubble=simulation.bubble_share,
        pipeline_seconds=simulation.makespan,
        data_parallel_seconds=communication,
        optimizer_seconds=optimizer,
        tokens_per_second=tokens,
        mfu=tokens * parameter_flops_per_token(config.model, config.lora) / peak,
        mfu_with_attention=tokens * training_flops_per_token(config.model, length, config.lora) / peak,
        hardware_share=tokens * hardware_flops_per_token(config.model, length, recomputed, config.lora) / peak,
    )


def _plan_stage(stage: StageModel, memory: Memory, cost: CostModel, ranks: int) -> StagePlan:
    chunks = stage.state.chunks

    def through_all(seconds: Callable[[StageModel, int, CostModel], float]) -> float:
        return sum(seconds(stage, chunk, cost) for chunk in range(len(chunks)))

    return StagePlan(
        ranks=(stage.index * ranks, (stage.index + 1) * ranks - 1),
        layers=[layer for chunk in chunks for layer in chunk.layers],
        parameters=stage.state.elements,
        memory=memory,
        traffic=stage_traffic(stage),
        forward_seconds=through_all(forward_seconds),
        backward_seconds=through_all(backward_seconds),
        tensor_seconds=through_all(tensor_seconds),
    )
