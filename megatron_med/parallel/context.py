"""The grid of ranks and its process groups. A ``ParallelContext`` is made once and passed down."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_med.config import ParallelConfig
from megatron_med.config.schema import OverlapConfig
from megatron_med.parallel.rendezvous import meet
from megatron_med.parallel.roll_call import RollCall
from megatron_med.parallel.weight_products import WeightProducts

GRID = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Dimensions of the grid, outermost first: tp is innermost so that it stays inside a node."""


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
        grid: all ranks as ``[pp, dp_replicate, dp_shard, cp, tp]``.
        sequence_parallel: activations between matrix products are cut along the sequence.
        overlap: which communication runs beside computation.
        timeout: how long a collective may wait; None: the backend's own.
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
    grid: torch.Tensor | None = None
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    timeout: timedelta | None = None
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
    store, rank, world_size = meet(timeout)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    return device, RollCall(dist.PrefixStore("roll_call", store), rank, world_size)


def start_fake_process_group(rank: int, world_size: int) -> torch.device:
    """Makes this process one rank of a world of which no other rank exists: torch's fake backend, whose collectives
    move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    return torch.device("cpu")


def create_context(config: ParallelConfig, device: torch.device, timeout: timedelta | None = None) -> ParallelContext:
    """Cuts the world into the grid of ``config``. Needs an initialised process group.

    Args:
        config: sizes of the axes.
        device: of this rank.
        timeout: how long a collective of any group may wait; None: the backend's own.
    """
    world_size = dist.get_world_size()
    unit = config.tensor * config.pipeline * config.context
    assert world_size % unit == 0, f"world size {world_size} is not a multiple of {unit}: validate() missed it"
    dp = world_size // unit
    shape = (config.pipeline, config.replicate, dp // config.replicate, config.context, config.tensor)
    grid = _Grid(torch.arange(world_size).view(shape), timeout)
    wraps = config.virtual_stages > 1
    pp = grid.axis("pp")
    return ParallelContext(
        device=device,
        world=Axis(world_size, dist.get_rank(), tuple(range(world_size)), dist.group.WORLD if world_size > 1 else None),
        tp=grid.axis("tp"),
        pp=pp,
        pp_backward=grid.axis("pp"),
        pp_wrap=grid.axis("pp") if wraps else Axis(),
        pp_wrap_backward=grid.axis("pp") if wraps else Axis(),
        dp=grid.axis("dp_replicate", "dp_shard", "cp"),
        dp_shard=grid.axis("dp_shard"),
        dp_replicate=grid.axis("dp_replicate"),
        cp=grid.axis("cp"),
        embedding=grid.ends_of_pipelines() if pp.size > 2 else pp,
        sequence_parallel=config.sequence_parallel and config.tensor > 1,
        grid=grid.ranks,
        overlap=config.overlap,
        timeout=timeout,
    )


class _Grid:
    """Slices of ``[pp, dp_replicate, dp_shard, cp, tp]`` as process groups."""

    def __init__(self, ranks: torch.Tensor, timeout: timedelta | None) -> None:
        self.ranks = ranks
        self._timeout = timeout

    def axis(self, *names: str) -> Axis:
        """The ranks that differ from this one in the named dimensions only, with a new group."""
        return self._own_group(self._lines(*names))

    def ends_of_pipelines(self) -> Axis:
        """First and last stage; a single rank on the stages between."""
        return self._own_group([[line[0], line[-1]] for line in self._lines("pp")])

    def _lines(self, *names: str) -> list[list[int]]:
        """Every set of ranks that differ in the named dimensions only."""
        dims = [GRID.index(name) for name in names]
        last = self.ranks.movedim(dims, list(range(-len(dims), 0)))
        return last.flatten(-len(dims)).flatten(0, -2).tolist()

    def _own_group(self, lines: list[list[int]]) -> Axis:
        if len(lines[0]) == 1:
            return Axis(ranks=(dist.get_rank(),))
        own = Axis(ranks=(dist.get_rank(),))
        for line in lines:  # every rank takes part in making every group
            group = dist.new_group(line, timeout=self._timeout)
            if dist.get_rank() in line:
                own = Axis(len(line), line.index(dist.get_rank()), tuple(line), group)
        return own
