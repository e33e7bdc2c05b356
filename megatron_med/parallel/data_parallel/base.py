"""What data-parallel ranks do with gradients and weights, whatever they share out.

Gradients are summed, never averaged: the loss is divided by the token count of the whole global batch before the
backward pass. ``sharding: none`` and ``optimizer`` are in ``buckets.py``, ``full`` in ``fully_sharded.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_med.parallel.context import Axis, ParallelContext
from megatron_med.parallel.parameters import ParameterLayout


@dataclass
class ParameterShard:
    """The shard of one parameter that this rank's optimizer updates.

    Attributes:
        layout: what the parameter declares.
        parameter: the tensor-parallel shard that the model computes with.
        master: fp32 weights of the shard. The parameter itself where it is whole and fp32.
        gradient: fp32 gradient of the shard, summed over all ranks after ``finalize_grads``; valid until the next step
            begins.
    """

    layout: ParameterLayout
    parameter: nn.Parameter
    master: Tensor
    gradient: Tensor

    @property
    def is_sharded(self) -> bool:
        """Whether data-parallel ranks hold different shards."""
        return self.master.shape != self.parameter.shape


@dataclass(frozen=True)
class FrozenShard:
    """What this rank holds of a parameter that is not trained.

    Attributes:
        layout: what the parameter declares.
        weight: the tensor-parallel shard, or this rank's part of it, in the type it is computed with.
        is_sharded: data-parallel ranks hold different parts.
    """

    layout: ParameterLayout
    weight: Tensor
    is_sharded: bool


class DataParallel(ABC):
    """Sums gradients over ranks and hands updated weights back to the model.

    Attributes:
        is_sharded: data-parallel ranks own different shards.
        owned: the shards that this rank's optimizer updates.
        frozen: what this rank holds of the parameters that are not trained.
    """

    def __init__(self, context: ParallelContext, is_sharded: bool) -> None:
        self.context = context
        self.is_sharded = is_sharded
        self.owned: list[ParameterShard] = []
        self.frozen: list[FrozenShard] = []

    @abstractmethod
    def begin_step(self, micro_batches: int) -> None:
        """Before the first micro-batch of a step: gradients are zero."""

    def before_backward(self, chunk: int, is_last: bool) -> None:  # noqa: B027  (most strategies need not know)
        """Before each backward pass of a chunk; ``is_last``: the one that completes its gradients."""

    @abstractmethod
    def finish_grad_sync(self) -> None:
        """Waits until every shard holds the sum over the data-parallel ranks."""

    @abstractmethod
    def start_param_sync(self) -> None:
        """Begins to copy the masters into the model; the next forward pass waits for what it needs."""

    @abstractmethod
    def finish_param_sync(self) -> None:
        """Waits until the model holds the updated weights."""

    @torch.no_grad()
    def finalize_grads(self) -> None:
        """Completes the reduction, then sums what tensor-parallel ranks and tied stages hold in parts."""
        self.finish_grad_sync()
        partial = [item.gradient for item in self.owned if item.layout.partial_over_tp]
        _all_reduce_together(partial, self.context.tp)
        if self.context.pp.is_first or self.context.pp.is_last:
            shared = [item.gradient for item in self.owned if item.layout.shared]
            _all_reduce_together(shared, self.context.embedding)

    def counts_in_norm(self, item: ParameterShard) -> bool:
        """Whether this rank's shard is the one counted among its copies on other ranks."""
        context = self.context
        copies = [] if item.layout.tp_dim is not None else [context.tp]
        copies.append(context.dp_replicate if item.is_sharded else context.loss)
        if item.layout.shared:
            copies.append(context.embedding)
        return all(axis.is_first for axis in copies)


def _all_reduce_together(tensors: list[Tensor], axis: Axis) -> None:
    """One all-reduce for many small tensors, in place."""
    if axis.group is None or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=axis.group)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))
