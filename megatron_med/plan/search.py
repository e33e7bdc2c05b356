"""Ranks the ways to cut a run over a cluster: the answer to "how do I set TP and PP?"."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any, cast

import torch

from megatron_med.config import Config
from megatron_med.config.schema import ParallelConfig
from megatron_med.config.validate import validate
from megatron_med.model.build import DTYPES
from megatron_med.optim.groups import check_groups
from megatron_med.plan.cluster import GIB, Cluster
from megatron_med.plan.cost_model import CostModel, KernelAssumptions
from megatron_med.plan.layer_trace import fake_world
from megatron_med.plan.memory import Memory, peak_memories
from megatron_med.plan.predict import Plan, predict
from megatron_med.plan.stage_model import StageModel, StageState, build_states, model_stages
from megatron_med.plan.step_time import backward_seconds, forward_seconds
from megatron_med.progress import progress_bar

MICRO_BATCHES = (1, 2, 4, 8, 16)
CHUNKS = (2, 4)

PLANS_OF_A_SIZE = 3
"""Plans of one tensor x pipeline size among the best: more would only differ in small things."""


@dataclass(frozen=True)
class Size:
    """What one tensor x pipeline size is good for.

    Attributes:
        tokens_per_second: of its best plan; None where none fits.
        reason: why none fits, or the memory of the best.
    """

    tensor: int
    pipeline: int
    tokens_per_second: float | None
    reason: str


@dataclass(frozen=True)
class SearchResult:
    """
    Attributes:
        best: plans that fit, fastest first.
        sizes: every tensor x pipeline size.
        tried: candidates whose memory was computed.
        fitting: candidates that fit.
    """

    best: list[Plan]
    sizes: list[Size]
    tried: int
    fitting: int


@dataclass(frozen=True)
class _Candidate:
    stages: list[StageModel]
    memories: list[Memory]
    least_seconds: float


def search(config: Config, cluster: Cluster, kernels: KernelAssumptions | None = None, keep: int = 10) -> SearchResult:
    """Plans every sensible cut of a run whose model, sequence and global batch stay as they are.

    Tensor sizes up to a node, all pipeline sizes, schedules, shardings and micro-batches up to 16; recomputation of
    whole layers only where it does not fit without. One process a core, and a bar on a terminal.
    """
    check_groups(config.model, config.optimizer.groups, config.lora)
    one_size = partial(_search_size, config, cluster, kernels or KernelAssumptions())
    tensor_sizes = [tensor for tensor in range(1, cluster.gpus_per_node + 1) if cluster.gpus_per_node % tensor == 0]
    grids = [(tensor, pipeline) for tensor in tensor_sizes for pipeline in _pipeline_sizes(config, cluster, tensor)]
    results = []
    context = get_context("forkserver")
    context.set_forkserver_preload(["megatron_med.plan.search"])  # imported once, unless a server runs already
    processes = max(1, min(os.cpu_count() or 1, len(grids)))
    with ProcessPoolExecutor(processes, context) as pool, progress_bar("grids", len(grids)) as advance:
        for result in pool.map(one_size, *zip(*grids, strict=True)):
            results.append(result)
            advance()
    best = sorted((plan for result in results for plan in result.best), key=lambda plan: plan.step_seconds)
    return SearchResult(
        best[:keep],
        [size for result in results for size in result.sizes],
        sum(result.tried for result in results),
        sum(result.fitting for result in results),
    )


def _search_size(
    config: Config, cluster: Cluster, kernels: KernelAssumptions, tensor: int, pipeline: int
) -> SearchResult:
    """One size of tensor and pipeline."""
    torch.set_num_threads(1)
    cost = CostModel(cluster, kernels, DTYPES[config.precision].itemsize)
    with fake_world():
        found, reason, tried = _fitting(config, cost, tensor, pipeline)
        plans = _fastest(found, cost)
    if not plans:
        return SearchResult([], [Size(tensor, pipeline, None, reason)], tried, len(found))
    memory = max(stage.memory.total for stage in plans[0].stages)
    size = Size(tensor, pipeline, plans[0].tokens_per_second, f"takes {_of(memory, cluster)}")
    return SearchResult(plans, [size], tried, len(found))


def _pipeline_sizes(config: Config, cluster: Cluster, tensor: int) -> Iterator[int]:
    """Stages that, times ``tensor``, divide the cluster."""
    for pipeline in range(1, min(config.model.num_layers, cluster.world_size) + 1):
        if cluster.world_size % (tensor * pipeline) == 0:
            yield pipeline


def _fitting(config: Config, cost: CostModel, tensor: int, pipeline: int) -> tuple[list[_Candidate], str, int]:
    """Candidates of one tensor x pipeline size that fit; else why the closest one does not; how many were tried."""
    found: list[_Candidate] = []
    reasons: list[tuple[float, str]] = []
    states: dict[tuple[int, str, int], list[StageState]] = {}
    cluster, tried = cost.cluster, 0
    for parallel in _cuts(config, cluster, tensor, pipeline):
        for micro_batch in MICRO_BATCHES:
            own = [_variant(config, parallel, micro_batch, recompute) for recompute in ("none", "full")]
            broken = validate(own[0], cluster.world_size)
            if broken:
                reasons.append((float("inf"), broken[0]))
                continue
            key = parallel.virtual_stages, parallel.sharding, parallel.replicate
            if key not in states:
                states[key] = build_states(own[0], cluster)
            least = max(state.weights + state.gradients + state.optimizer for state in states[key])
            if least > cluster.usable_memory:
                reasons.append((least, f"weights, gradients and optimizer state alone take {_of(least, cluster)}"))
                tried += 1
                break
            candidate, needed, count = _first_that_fits(own, states[key], cost)
            tried += count
            if candidate is None:  # a larger micro-batch needs more
                words = f"needs {_of(needed, cluster)}, whole layers recomputed, micro-batch {micro_batch}"
                reasons.append((needed, words))
                break
            found.append(candidate)
    return found, min(reasons, default=(0.0, "nothing to try"))[1], tried


def _first_that_fits(
    variants: list[Config], states: list[StageState], cost: CostModel
) -> tuple[_Candidate | None, float, int]:
    """The first variant that fits, the memory of the last one tried, and how many were tried."""
    needed = 0.0
    for count, config in enumerate(variants, 1):
        stages = model_stages(config, states)
        memories = peak_memories(stages)
        needed = max(memory.total for memory in memories)
        if needed <= cost.cluster.usable_memory:
            return _Candidate(stages, memories, _least_seconds(stages, cost)), needed, count
    return None, needed, len(variants)


def _of(needed: float, cluster: Cluster) -> str:
    return f"{needed / GIB:.1f} of {cluster.usable_memory / GIB:.1f} GiB"


def _cuts(config: Config, cluster: Cluster, tensor: int, pipeline: int) -> Iterator[ParallelConfig]:
    """Schedules and shardings of one tensor x pipeline size."""
    data = ParallelConfig(tensor=tensor, pipeline=pipeline).data_size(cluster.world_size)
    nodes = max(1, data * tensor // cluster.gpus_per_node)
    schedules = [("1f1b", 1)]
    if pipeline > 1:
        schedules += [("interleaved", chunks) for chunks in CHUNKS] + [("zero_bubble", 1)]
    shardings = [("optimizer", 1)]
    if data > 1:
        shardings.append(("full", 1))
        if nodes > 1 and data % nodes == 0 and data > nodes:
            shardings += [("optimizer", nodes), ("full", nodes)]
    for schedule, chunks in schedules:
        for sharding, replicate in shardings:
            yield dataclasses.replace(
                config.parallel,
                tensor=tensor,
                pipeline=pipeline,
                virtual_stages=chunks,
                schedule=cast(Any, schedule),
                sharding=cast(Any, sharding),
                replicate=replicate,
                layers_per_stage=None,
                sequence_parallel=True,
            )


def _variant(config: Config, parallel: ParallelConfig, micro_batch: int, recompute: str) -> Config:
    train = dataclasses.replace(config.train, micro_batch_size=micro_batch)
    return dataclasses.replace(
        config,
        parallel=parallel,
        train=train,
        recompute=cast(Any, recompute),
        recompute_interval=1,
    )


def _least_seconds(stages: list[StageModel], cost: CostModel) -> float:
    """The slowest stage without any bubble: no schedule is faster."""

    def work(stage: StageModel) -> float:
        chunks = range(len(stage.traces))
        return sum(forward_seconds(stage, c, cost) + backward_seconds(stage, c, cost) for c in chunks)

    return stages[0].micro_batches * max(work(stage) for stage in stages)


def _fastest(candidates: list[_Candidate], cost: CostModel, keep: int = PLANS_OF_A_SIZE) -> list[Plan]:
    """Simulates the candidates in the order of their bounds, until no bound can beat the best ones."""
    best: list[Plan] = []
    for candidate in sorted(candidates, key=lambda candidate: candidate.least_seconds):
        if len(best) == keep and candidate.least_seconds > best[-1].step_seconds:
            break
        best.append(predict(candidate.stages, candidate.memories, cost))
        best = sorted(best, key=lambda plan: plan.step_seconds)[:keep]
    return best
