"""The grid of ranks and its process groups. A ``ParallelContext`` is made once and passed down."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from megatron_med.config import ParallelConfig
from megatron_med.config.schema import OverlapConfig
from megatron_med.parallel.roll_call import RollCall
from megatron_med.parallel.weight_products import WeightProducts

GRID = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Mesh dimensions, outermost first: tp is innermost so that it stays inside a node."""


@dataclass(frozen=True)
class Axis:
    """The ranks that differ from this one in one direction of the grid only.

    ``group`` is None where the axis has a single rank: collectives then do nothing.
    """

    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True)
class ParallelContext:
    """Coordinates and groups of this rank.

    Attributes:
        world, tp, pp, dp, dp_shard, dp_replicate, cp: axes of the grid; dp is dp_replicate x dp_shard x cp.
        embedding: first and last stage of this rank's pipeline, which share tied embeddings; a single rank
            on the stages between.
        pp_backward: the same ranks as pp with a group of their own, so that gradients travelling back never
            wait behind activations travelling forward.
        pp_wrap, pp_wrap_backward: the same again for the way from the last stage to the first one's next chunk:
            with two stages it runs between the same two ranks in the opposite direction.
        mesh: the same groups as a DeviceMesh; None without a process group.
        grid: all ranks as ``[pp, dp_replicate, dp_shard, cp, tp]``.
        sequence_parallel: activations between matrix products are cut along the sequence.
        overlap: which communication runs beside computation.
        weight_products: runs this rank's weight-gradient products, or keeps them for later.
    """

    device: torch.device
    world: Axis = Axis()
    tp: Axis = Axis()
    pp: Axis = Axis()
    pp_backward: Axis = Axis()
    pp_wrap: Axis = Axis()
    pp_wrap_backward: Axis = Axis()
    dp: Axis = Axis()
    dp_shard: Axis = Axis()
    dp_replicate: Axis = Axis()
    cp: Axis = Axis()
    embedding: Axis = Axis()
    sequence_parallel: bool = False
    mesh: DeviceMesh | None = None
    grid: torch.Tensor | None = None
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    weight_products: WeightProducts = field(default_factory=WeightProducts)

    @property
    def sequence_shards(self) -> int:
        """Pieces that sequence parallelism cuts the sequence into."""
        return self.tp.size if self.sequence_parallel else 1


def single_process_context(device: torch.device | None = None) -> ParallelContext:
    """One rank, no process group."""
    return ParallelContext(device=device or torch.device("cpu"))


def start_process_group(timeout: timedelta) -> tuple[torch.device, RollCall]:
    """Joins the ranks that torchrun started, or makes a world of one.

    Returns:
        This rank's device, and the means to tell who is silent when a collective fails.
    """
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    rank, world_size = 0, 1
    store: dist.Store = dist.HashStore()
    if "RANK" in os.environ:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        await_all_ranks(dist.PrefixStore("preflight", store), rank, world_size, timeout)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    return device, RollCall(dist.PrefixStore("roll_call", store), rank, world_size)


def create_context(config: ParallelConfig, device: torch.device) -> ParallelContext:
    """Cuts the world into the grid of ``config``. Needs an initialised process group."""
    world_size = dist.get_world_size()
    unit = config.tensor * config.pipeline * config.context
    assert world_size % unit == 0, f"world size {world_size} is not a multiple of {unit}: validate() missed it"
    dp = world_size // unit
    shape = (config.pipeline, config.replicate, dp // config.replicate, config.context, config.tensor)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=GRID)
    axes = {name: _axis(mesh[name].get_group(), mesh[name].size()) for name in GRID}
    wraps = config.virtual_stages > 1
    data = mesh["dp_replicate", "dp_shard", "cp"]._flatten("dp")
    world = dist.group.WORLD
    assert world is not None, "the process group is not initialised"
    return ParallelContext(
        device=device,
        world=_axis(world, world_size),
        tp=axes["tp"],
        pp=axes["pp"],
        pp_backward=_another_pipeline_axis(mesh, axes["pp"]),
        pp_wrap=_another_pipeline_axis(mesh, axes["pp"]) if wraps else Axis(),
        pp_wrap_backward=_another_pipeline_axis(mesh, axes["pp"]) if wraps else Axis(),
        dp=_axis(data.get_group(), data.size()),
        dp_shard=axes["dp_shard"],
        dp_replicate=axes["dp_replicate"],
        cp=axes["cp"],
        embedding=_embedding_axis(mesh, axes["pp"]),
        sequence_parallel=config.sequence_parallel and config.tensor > 1,
        mesh=mesh,
        grid=mesh.mesh,
        overlap=config.overlap,
    )


def await_all_ranks(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> None:
    """Waits in the rendezvous store, before any connection is made, until every rank has come.

    Raises:
        RuntimeError: names the ranks that did not come in time.
    """
    store.set(str(rank), "here")
    everybody = [str(other) for other in range(world_size)]
    try:
        store.wait(everybody, timeout)
    except RuntimeError as error:  # its own message is a list of keys
        missing = [int(other) for other in everybody if not store.check([other])]
        raise RuntimeError(f"ranks {missing} of {world_size} did not start within {timeout}") from error


def preflight(context: ParallelContext) -> None:
    """One small collective in every group."""
    one = torch.ones(1, device=context.device)
    for axis in (
        context.tp,
        context.pp,
        context.pp_backward,
        context.pp_wrap,
        context.pp_wrap_backward,
        context.dp,
        context.dp_shard,
        context.dp_replicate,
        context.embedding,
    ):
        if axis.group is not None:
            total = one.clone()
            dist.all_reduce(total, group=axis.group)
            assert total.item() == axis.size, f"ranks {axis.ranks}: {total.item()} of {axis.size} answered"


def _axis(group: dist.ProcessGroup, size: int) -> Axis:
    ranks = tuple(dist.get_process_group_ranks(group))
    return Axis(size, dist.get_group_rank(group, dist.get_rank()), ranks, group if size > 1 else None)


def _pipelines(mesh: DeviceMesh) -> list[list[int]]:
    """The ranks of every pipeline, first to last stage."""
    grid = mesh.mesh
    return grid.flatten(1).t().tolist()


def _another_pipeline_axis(mesh: DeviceMesh, pp: Axis) -> Axis:
    if pp.size == 1:
        return Axis()
    group, _ = dist.new_subgroups_by_enumeration(_pipelines(mesh))
    return _axis(group, pp.size)


def _embedding_axis(mesh: DeviceMesh, pp: Axis) -> Axis:
    """First and last stage. With two stages these are the whole pipeline; with one there is nobody to share with."""
    if pp.size <= 2:
        return pp
    groups = [[ranks[0], ranks[-1]] for ranks in _pipelines(mesh)]
    group = None
    for ranks in groups:
        candidate = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            group = candidate
    return _axis(group, 2) if group is not None else Axis()
