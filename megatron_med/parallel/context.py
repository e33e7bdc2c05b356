"""The grid of ranks and its process groups. A ``ParallelContext`` is made once and passed down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_med.config import ParallelConfig
from megatron_med.config.schema import OverlapConfig
from megatron_med.parallel.gloo import yield_to_computation

GRID = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Dimensions of the grid, outermost first: tp is innermost so that it stays inside a node."""

AXES: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in ("tp", "pp", "dp_shard", "dp_replicate", "cp")},
    "batch": ("dp_replicate", "dp_shard"),
    "loss": ("dp_replicate", "dp_shard", "cp"),
    "fsdp": ("dp_shard", "cp"),
}
"""Axes of the grid by the dimensions in which their ranks differ. Equal axes share a group and the first one's name."""


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
        tp, pp, dp_shard, dp_replicate, cp: dimensions of the grid.
        batch: dp_replicate x dp_shard, over which samples are dealt.
        loss: batch x cp, over which gradients and token counts are summed.
        fsdp: dp_shard x cp, over which parameters or optimizer states are cut.
        pp_backward: the same ranks as pp with a group of their own, so that gradients travelling back never
            wait for activations travelling forward.
        pp_wrap, pp_wrap_backward: the same again for the way from the last stage to the first one's next chunk:
            with two stages it runs between the same two ranks in the opposite direction.
        embedding: first and last stage of this rank's pipeline, which share tied embeddings; a single rank
            on the stages between.
        world: all ranks.
        grid: all ranks as ``[pp, dp_replicate, dp_shard, cp, tp]``.
        sequence_parallel: activations between matrix products are cut along the sequence.
        overlap: which communication runs during computation.
        timeout: how long a collective may wait; None: the backend's own.
    """

    device: torch.device
    tp: Axis = Axis()
    pp: Axis = Axis()
    dp_shard: Axis = Axis()
    dp_replicate: Axis = Axis()
    cp: Axis = Axis()
    batch: Axis = Axis()
    loss: Axis = Axis()
    fsdp: Axis = Axis()
    pp_backward: Axis = Axis()
    pp_wrap: Axis = Axis()
    pp_wrap_backward: Axis = Axis()
    embedding: Axis = Axis()
    world: Axis = Axis()
    sequence_parallel: bool = False
    grid: torch.Tensor | None = None
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    timeout: timedelta | None = None

    def axes(self) -> dict[str, Axis]:
        """Every axis by name; of those that share a group the first one names it."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Axis)}

    @property
    def sequence_shards(self) -> int:
        """Shards that sequence parallelism cuts the sequence into."""
        return self.tp.size if self.sequence_parallel else 1


def single_process_context(device: torch.device | None = None) -> ParallelContext:
    """One rank, no process group."""
    return ParallelContext(device=device or torch.device("cpu"))


def create_context(config: ParallelConfig, device: torch.device, timeout: timedelta | None = None) -> ParallelContext:
    """Cuts the world into the grid of ``config``. Needs an initialised process group.

    Args:
        config: sizes of the axes.
        device: of this rank.
        timeout: how long a collective of any group may wait; None: the backend's own.
    """
    world_size = dist.get_world_size()
    grid = RankGrid(config, world_size)
    groups = _Groups(timeout)
    by_label = {label: groups.of(grid.lines(*AXES[label])) for label in dict.fromkeys(map(grid.label, AXES))}
    pp = by_label[grid.label("pp")]
    wraps = config.virtual_stages > 1
    context = ParallelContext(
        device=device,
        **{name: by_label[grid.label(name)] for name in AXES},
        pp_backward=groups.of(grid.lines("pp")),
        pp_wrap=groups.of(grid.lines("pp")) if wraps else Axis(),
        pp_wrap_backward=groups.of(grid.lines("pp")) if wraps else Axis(),
        embedding=groups.of(grid.ends_of_pipelines()) if pp.size > 2 else pp,
        world=Axis(world_size, dist.get_rank(), tuple(range(world_size)), dist.group.WORLD if world_size > 1 else None),
        sequence_parallel=config.sequence_parallel and config.tensor > 1,
        grid=grid.ranks,
        overlap=config.overlap,
        timeout=timeout,
    )
    yield_to_computation()
    return context


class RankGrid:
    """All ranks of a world as ``[pp, dp_replicate, dp_shard, cp, tp]``. Knows no process group.

    Args:
        config: sizes of the axes.
        world_size: a multiple of what ``config`` gives one replica.
    """

    def __init__(self, config: ParallelConfig, world_size: int) -> None:
        assert world_size % config.model_ranks == 0, (
            f"world size {world_size} is not a multiple of {config.model_ranks}: validate() missed it"
        )
        shards = config.data_size(world_size) // config.replicate
        shape = (config.pipeline, config.replicate, shards, config.context, config.tensor)
        self.ranks = torch.arange(world_size).view(shape)

    def lines(self, *names: str) -> list[list[int]]:
        """Every set of ranks that differ in the named dimensions only."""
        dims = [GRID.index(name) for name in names]
        last = self.ranks.movedim(dims, list(range(-len(dims), 0)))
        return last.flatten(-len(dims)).flatten(0, -2).tolist()

    def ends_of_pipelines(self) -> list[list[int]]:
        """First and last stage of every pipeline; the stages between stand in none."""
        return [[line[0], line[-1]] for line in self.lines("pp")]

    def label(self, axis: str) -> str:
        """The first of ``AXES`` with the same sets of ranks."""
        return next(name for name in AXES if self._spread(name) == self._spread(axis))

    def _spread(self, axis: str) -> list[str]:
        """Dimensions of an axis that have more than one rank."""
        return [name for name in AXES[axis] if self.ranks.shape[GRID.index(name)] > 1]


def axis_label(axes: Mapping[str, Axis], name: str) -> str:
    """The name under which the traffic of an axis is counted: the first of ``AXES`` with the same ranks."""
    return next(label for label in AXES if axes[label].ranks == axes[name].ranks)


class _Groups:
    """Makes process groups; every rank takes part in making every one."""

    def __init__(self, timeout: timedelta | None) -> None:
        self._timeout = timeout

    def of(self, lines: list[list[int]]) -> Axis:
        """A new group for each line; this rank's own. A single rank where no line has it, or lines of one."""
        rank = dist.get_rank()
        own = Axis(ranks=(rank,))
        for line in lines if len(lines[0]) > 1 else ():
            group = dist.new_group(line, timeout=self._timeout)
            if rank in line:
                own = Axis(len(line), line.index(rank), tuple(line), group)
        return own
