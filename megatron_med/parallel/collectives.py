"""Collectives that autograd knows: each Function's docstring says what forward does and what backward does.

Sequence-parallel tensors are cut on dimension 0, ``[seq/tp, batch, hidden]`` (Korthikanti et al. 2022).
All of them do nothing on an axis with a single rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron_med.errors import UserError
from megatron_med.parallel.context import Axis, ParallelContext

T = TypeVar("T")


class Pending:
    """A collective under way. ``wait`` gives its result; only then may it be read."""

    def __init__(self, result: Tensor, work: dist.Work | None = None, source: Tensor | None = None) -> None:
        self._result = result
        self._work = work
        self._source = source  # kept alive until the collective has read it

    def is_completed(self) -> bool:
        """Whether ``wait`` would return at once."""
        return self._work is None or self._work.is_completed()

    def wait(self) -> Tensor:
        """The result; on a GPU the current stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
            self._work = self._source = None
        return self._result


def start_all_reduce(tensor: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Pending:
    """Begins to sum (or ``op``) in place over the axis."""
    if axis.group is None:
        return Pending(tensor)
    return Pending(tensor, dist.all_reduce(tensor, op=op, group=axis.group, async_op=True))


def start_all_gather(tensor: Tensor, axis: Axis) -> Pending:
    """Begins ``[n, ...]`` on each rank -> ``[n * size, ...]``, in rank order."""
    if axis.group is None:
        return Pending(tensor)
    tensor = tensor.contiguous()
    gathered = tensor.new_empty(tensor.shape[0] * axis.size, *tensor.shape[1:])
    return Pending(gathered, dist.all_gather_single(gathered, tensor, group=axis.group, async_op=True), tensor)


def start_reduce_scatter(tensor: Tensor, axis: Axis) -> Pending:
    """Begins ``[n * size, ...]`` on each rank -> this rank's ``[n, ...]`` of the sum."""
    if axis.group is None:
        return Pending(tensor)
    tensor = tensor.contiguous()
    scattered = tensor.new_empty(tensor.shape[0] // axis.size, *tensor.shape[1:])
    return Pending(scattered, dist.reduce_scatter_single(scattered, tensor, group=axis.group, async_op=True), tensor)


def all_reduce(tensor: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Sums (or ``op``) in place over the axis."""
    return start_all_reduce(tensor, axis, op).wait()


def all_gather_first_dim(tensor: Tensor, axis: Axis) -> Tensor:
    """``[n, ...]`` on each rank -> ``[n * size, ...]``, in rank order."""
    return start_all_gather(tensor, axis).wait()


def reduce_scatter_first_dim(tensor: Tensor, axis: Axis) -> Tensor:
    """``[n * size, ...]`` on each rank -> this rank's ``[n, ...]`` of the sum."""
    return start_reduce_scatter(tensor, axis).wait()


def split_first_dim(tensor: Tensor, axis: Axis) -> Tensor:
    """This rank's ``1 / size`` of dimension 0."""
    return tensor.chunk(axis.size)[axis.rank].contiguous()


class _ReduceFromTensorParallel(Function):
    """Forward: all-reduce. Backward: identity. (Megatron's g)"""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        return all_reduce(tensor.contiguous().clone(), axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _ReduceScatterToSequence(Function):
    """Forward: reduce-scatter the sequence. Backward: all-gather it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter_first_dim(tensor, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return all_gather_first_dim(gradients[0], ctx.axis), None


def reduce_from_tensor_parallel(tensor: Tensor, axis: Axis, sequence_parallel: bool) -> Tensor:
    """Sums the partial results of a row-parallel product; ``[seq/tp, batch, hidden]`` under sequence parallelism."""
    if axis.size == 1:
        return tensor
    function = _ReduceScatterToSequence if sequence_parallel else _ReduceFromTensorParallel
    return function.apply(tensor, axis)


class _CopyToTensorParallel(Function):
    """Forward: identity. Backward: all-reduce. (Megatron's f)"""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradients[0].contiguous().clone(), ctx.axis), None


class _GatherFromSequence(Function):
    """Forward: all-gather the sequence. Backward: reduce-scatter it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather_first_dim(tensor, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_first_dim(gradients[0], ctx.axis), None


def copy_to_tensor_parallel(tensor: Tensor, axis: Axis, sequence_parallel: bool) -> Tensor:
    """``[seq(/tp), ...] -> [seq, ...]``: what every rank multiplies by weights of its own. Gradients are summed
    over the ranks."""
    if axis.size == 1:
        return tensor
    function = _GatherFromSequence if sequence_parallel else _CopyToTensorParallel
    return function.apply(tensor, axis)


class _GatherScores(Function):
    """Forward: all-gather the sequence. Backward: this rank's part, since every rank goes on alike with the whole."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather_first_dim(tensor, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return split_first_dim(gradients[0], ctx.axis), None


def gather_sequence(tensor: Tensor, axis: Axis) -> Tensor:
    """``[seq/tp, ...] -> [seq, ...]`` for what every rank computes alike from here on."""
    return tensor if axis.size == 1 else _GatherScores.apply(tensor, axis)


def gather_last_dim(tensor: Tensor, axis: Axis) -> Tensor:
    """``[..., n]`` on each rank -> ``[..., n * size]``. No gradient: for logits that are looked at."""
    if axis.group is None:
        return tensor
    gathered = all_gather_first_dim(tensor.detach().movedim(-1, 0).contiguous(), axis)
    return gathered.movedim(0, -1)


def broadcast(tensor: Tensor, axis: Axis, source: int) -> Tensor:
    """In place, from the axis' rank ``source``."""
    if axis.group is not None:
        dist.broadcast(tensor, axis.ranks[source], group=axis.group)
    return tensor


def gather_objects(value: Any, axis: Axis) -> list[Any]:
    """One small Python value of each rank, on every rank."""
    if axis.group is None:
        return [value]
    values: list[Any] = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def broadcast_object(value: Any, axis: Axis, source: int = 0) -> Any:
    """One small Python value of rank ``source``, on every rank."""
    if axis.group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, axis.ranks[source], group=axis.group, device=torch.device("cpu"))
    return values[0]


def on_first_rank(context: ParallelContext, action: Callable[[], T]) -> T:
    """Runs ``action`` on rank 0; every rank gets its value, or raises its fault, so that all of them end together."""
    failure: UserError | None = None
    value: Any = None
    if context.world.is_first:
        try:
            value = action()
        except UserError as error:
            failure = error
    kind, faults, value = broadcast_object(
        (type(failure), failure.faults, None) if failure else (None, [], value), context.world
    )
    if kind is not None:
        raise kind(faults)
    return value
