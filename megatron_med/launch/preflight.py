"""Before the first step: one small message through every group and between every two neighbouring stages."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_med.parallel.context import Axis, ParallelContext


def preflight(context: ParallelContext) -> None:
    """Finds ranks that cannot talk to each other, and makes every connection that training will use.

    The latter matters with NCCL: two ranks make a connection together, at their first message, and a stage that
    asks for a gradient ahead of time would wait there while its neighbour waits for a hidden state.
    """
    one = torch.ones(1, device=context.device)
    groups = {axis.group: axis for axis in context.axes().values() if axis.group is not None}
    for axis in groups.values():
        total = one.clone()
        dist.all_reduce(total, group=axis.group)
        assert total.item() == axis.size, f"ranks {axis.ranks}: {total.item()} of {axis.size} answered"
    for axis, source, target in _links(context):
        _send_one(axis, source, target, one)


def _links(context: ParallelContext) -> list[tuple[Axis, int, int]]:
    """(group, sending stage, receiving stage) of every way that hidden states or gradients take."""
    last = context.pp.size - 1
    ways = []
    for stage in range(last):
        ways += [(context.pp, stage, stage + 1), (context.pp_backward, stage + 1, stage)]
    ways += [(context.pp_wrap, last, 0), (context.pp_wrap_backward, 0, last)]
    return [way for way in ways if way[0].group is not None]


def _send_one(axis: Axis, source: int, target: int, one: torch.Tensor) -> None:
    if axis.rank == source:
        dist.send(one, axis.ranks[target], group=axis.group)
    elif axis.rank == target:
        received = torch.zeros_like(one)
        dist.recv(received, axis.ranks[source], group=axis.group)
        assert received.item() == 1, f"rank {axis.ranks[source]} sent {received.item()} instead of 1"
