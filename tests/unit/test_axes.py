"""The axes of the grid, context parallelism included, which no run is allowed to use yet: on ranks of a world that is
not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_med.checkpoint.views import GlobalViews
from megatron_med.config import ModelConfig, ParallelConfig
from megatron_med.launch.fake import start_fake_process_group
from megatron_med.model.build import build_chunks
from megatron_med.parallel.context import GRID, ParallelContext, create_context
from megatron_med.parallel.data_parallel.buckets import BucketedDataParallel
from megatron_med.parallel.data_parallel.fully_sharded import FullyShardedDataParallel
from megatron_med.parallel.parameters import initialise
from megatron_med.tracing.recorder import group_labels
from tests.training import GPT2

SHAPE = (2, 2, 2, 2, 2)  # pp, dp_replicate, dp_shard, cp, tp
PARALLEL: dict[str, Any] = {"tensor": 2, "pipeline": 2, "context": 2, "replicate": 2}
WORLD = 32
DIMENSIONS = {
    "tp": {"tp"},
    "pp": {"pp"},
    "pp_backward": {"pp"},
    "dp_replicate": {"dp_replicate"},
    "dp_shard": {"dp_shard"},
    "cp": {"cp"},
    "batch": {"dp_replicate", "dp_shard"},
    "loss": {"dp_replicate", "dp_shard", "cp"},
    "fsdp": {"dp_shard", "cp"},
    "embedding": {"pp"},
    "world": set(GRID),
}


@contextmanager
def _rank(rank: int, world: int = WORLD, **parallel: Any) -> Iterator[ParallelContext]:
    device = start_fake_process_group(rank, world)
    try:
        yield create_context(ParallelConfig(**parallel), device)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 13, 31])
def test_every_axis_has_the_ranks_that_differ_in_its_dimensions_only(rank: int) -> None:
    own = np.unravel_index(rank, SHAPE)
    with _rank(rank, **PARALLEL) as context:
        axes = context.axes()
    assert {name for name, axis in axes.items() if axis.size > 1} == DIMENSIONS.keys()
    for name, differing in DIMENSIONS.items():
        fixed = [dim for dim, dimension in enumerate(GRID) if dimension not in differing]
        ranks = [
            other
            for other in range(WORLD)
            if all(np.unravel_index(other, SHAPE)[place] == own[place] for place in fixed)
        ]
        assert list(axes[name].ranks) == ranks, name
        assert axes[name].ranks[axes[name].rank] == rank


def test_equal_axes_share_a_group_and_a_label() -> None:
    with _rank(5, 8, tensor=2, pipeline=2) as context:
        assert context.batch is context.loss is context.fsdp is context.dp_shard
        assert context.pp_backward.group is not context.pp.group
        assert sorted(group_labels(context).values()) == ["dp_shard", "pp", "pp_backward", "tp", "world"]
    with _rank(5, 16, tensor=2, pipeline=2, replicate=2) as context:
        assert context.batch is context.loss
        assert context.fsdp is context.dp_shard
        labels = set(group_labels(context).values())
        assert labels == {"batch", "dp_shard", "dp_replicate", "pp", "pp_backward", "tp", "world"}


@pytest.mark.parametrize("sharding", ["none", "optimizer"])
def test_the_norm_counts_every_element_once(sharding: str) -> None:
    """Slices are cut over the shards and the context-parallel ranks; the tied embedding lies on both stages."""
    config = ModelConfig(**GPT2 | {"num_layers": 2})
    counted: Counter[str] = Counter()
    wanted = {}
    for rank in range(WORLD):
        with _rank(rank, **PARALLEL) as context:
            chunks = build_chunks(config, context, torch.float32, ParallelConfig(**PARALLEL))
            data_parallel = BucketedDataParallel(chunks, context, shard=sharding == "optimizer")
            for item in data_parallel.owned:
                wanted[item.layout.name] = prod(item.layout.global_shape)
                counted[item.layout.name] += item.gradient.numel() * data_parallel.counts_in_norm(item)
    assert dict(counted) == wanted


def test_meshes_cut_over_shards_and_context_ranks() -> None:
    config = ModelConfig(**GPT2 | {"num_layers": 2})
    pp, replicate, _, _, tp = np.unravel_index(21, SHAPE)
    grid = np.arange(WORLD).reshape(SHAPE)
    with _rank(21, **PARALLEL) as context:
        chunks = build_chunks(config, context, torch.float32, ParallelConfig(**PARALLEL))
        initialise(chunks, context, 1)
        data_parallel = FullyShardedDataParallel(chunks, context, torch.float32)
        mesh = data_parallel._mesh
        assert mesh.mesh_dim_names == ("dp_replicate", "fsdp")
        assert np.array_equal(mesh.mesh.numpy(), grid[pp, :, :, :, tp].reshape(2, 4))
        for item in data_parallel.owned:
            whole = prod(item.layout.local_shape(context.tp))
            assert item.master.numel() * 4 == whole, item.layout.name
        views = GlobalViews(context)
        assert views._mesh is not None
        assert np.array_equal(views._mesh.mesh.numpy(), grid[pp, replicate].reshape(4, 2).T)
