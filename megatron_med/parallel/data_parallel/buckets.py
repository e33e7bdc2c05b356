"""Gradient buckets: ``sharding: none`` and ``sharding: optimizer`` (ZeRO-1, Rajbhandari et al. 2020).

With ``optimizer`` each rank keeps the shard of every parameter along its declared dimension, so that optimizer states
are ordinary sharded tensors. With ``parallel.replicate`` the shards are summed over the replicas afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_med.parallel.collectives import Pending
from megatron_med.parallel.context import Axis, ParallelContext
from megatron_med.parallel.data_parallel.base import DataParallel, FrozenShard, ParameterShard
from megatron_med.parallel.parameters import MainGrad, layout_of, parameters_with_layout

BUCKET_ELEMENTS = 10_000_000
"""fp32 gradients that travel together: 40 MB, large enough for full bandwidth, small enough to overlap."""


class BucketedDataParallel(DataParallel):
    """Collects fp32 gradients in buckets, reduces each bucket as soon as it is complete, and gathers updated weights
    bucket by bucket under the next forward pass.

    Args:
        chunks: this rank's chunks of the model.
        context: the grid.
        shard: cut gradients and masters over the fsdp axis; else every rank keeps whole ones.
    """

    def __init__(self, chunks: nn.ModuleList, context: ParallelContext, shard: bool) -> None:
        super().__init__(context, is_sharded=shard)
        axis = context.fsdp if shard else Axis()
        replicas = context.dp_replicate if shard else context.loss
        self._complete: list[Bucket] = []
        self.buckets: list[Bucket] = []  # in the order of the forward pass
        for chunk in chunks:
            trained = []
            for layout, parameter in parameters_with_layout(chunk):
                if layout.trained:
                    trained.append(parameter)
                else:
                    self.frozen.append(FrozenShard(layout, parameter.data, is_sharded=False))
            for parameters in reversed(_fill(reversed(trained))):
                self.buckets.append(Bucket(parameters, axis, replicas, context, self._on_complete))
        self._await_in_forward(chunks)
        self.owned = [item for bucket in self.buckets for item in reversed(bucket.owned)]

    def begin_step(self, micro_batches: int) -> None:
        self._complete.clear()
        for bucket in self.buckets:
            bucket.begin_step(micro_batches)

    def _on_complete(self, bucket: Bucket) -> None:
        """A bucket has all of its gradients: it is cut and summed, and the one before it is summed over replicas."""
        if self.context.overlap.gradient_reduce:
            bucket.start_grad_sync()
            if self._complete:  # a fixed order over both groups: NCCL's must be the same on every rank
                self._complete[-1].start_replica_all_reduce()
        self._complete.append(bucket)

    def finish_grad_sync(self) -> None:
        late = [bucket for bucket in self.buckets if not bucket.is_complete]
        assert not late, f"{len(late)} gradient buckets are not complete: a parameter got no gradient"
        if not self.context.overlap.gradient_reduce:
            for bucket in self._complete:
                bucket.start_grad_sync()
        for bucket in self._complete:
            bucket.start_replica_all_reduce()
        for bucket in self._complete:
            bucket.finish_grad_sync()

    @torch.no_grad()
    def start_param_sync(self) -> None:
        for bucket in self.buckets:
            bucket.start_param_sync()
            if not self.context.overlap.weight_gather:
                bucket.finish_param_sync()

    def finish_param_sync(self) -> None:
        for bucket in self.buckets:
            bucket.finish_param_sync()

    def _await_in_forward(self, chunks: nn.ModuleList) -> None:
        """Each module waits for the buckets of its own parameters before it computes."""
        bucket_of = {id(parameter): bucket for bucket in self.buckets for parameter in bucket.parameters}
        for module in chunks.modules():
            own = [bucket_of[id(p)] for p in module.parameters(recurse=False) if id(p) in bucket_of]
            for bucket in dict.fromkeys(own):
                module.register_forward_pre_hook(lambda _module, _inputs, bucket=bucket: bucket.finish_param_sync())


def _fill(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if not buckets or parameter.numel() > room:
            buckets.append([])
            room = BUCKET_ELEMENTS
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets


class _Sharding:
    """How one parameter is cut over the ranks of ``axis``: ``torch.chunk``'s rule, the last shards may be short."""

    def __init__(self, parameter: nn.Parameter, axis: Axis) -> None:
        self.dim = layout_of(parameter).dp_dim
        self.shape = parameter.shape
        self.axis = axis
        self.length = self.shape[self.dim]
        self.chunk = -(-self.length // axis.size)
        self.padding = self.chunk * axis.size - self.length
        self.padded_shape = (*self.shape[: self.dim], self.chunk, *self.shape[self.dim + 1 :])
        self.start = min(axis.rank * self.chunk, self.length)
        self.owned_length = min(self.chunk, self.length - self.start)

    def shard(self, tensor: Tensor) -> Tensor:
        """This rank's shard of a whole tensor (a view)."""
        return tensor.narrow(self.dim, self.start, self.owned_length)

    def trim(self, padded: Tensor) -> Tensor:
        """The owned part of a padded shard (a view)."""
        return padded.view(self.padded_shape).narrow(self.dim, 0, self.owned_length)

    def all_shards(self, tensor: Tensor) -> Tensor:
        """A whole tensor -> ``[ranks, *padded_shape]``, padded with zeros."""
        if self.padding:
            after = [0, 0] * (tensor.dim() - 1 - self.dim) + [0, self.padding]
            tensor = F.pad(tensor, after)
        return tensor.unflatten(self.dim, (self.axis.size, self.chunk)).movedim(self.dim, 0)

    def unshard(self, shards: Tensor) -> Tensor:
        """``[ranks, *padded_shape]`` -> the whole tensor, padding removed."""
        joined = shards.movedim(0, self.dim).flatten(self.dim, self.dim + 1)
        return joined.narrow(self.dim, 0, self.length)


class Bucket:
    """Parameters whose gradients travel together. ``row`` is the number of elements of one rank's shards.

    With shards the travelling buffer is ``[ranks, elements]``: row r holds rank r's shard of every parameter.
    The copy into it costs once a step.

    Args:
        parameters: of one chunk.
        axis: ranks that cut the shards; one rank where they are whole.
        replicas: ranks that hold the same shards and sum them.
        context: the grid.
        on_complete: called when the last gradient of the step has arrived.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        axis: Axis,
        replicas: Axis,
        context: ParallelContext,
        on_complete: Callable[[Bucket], None],
    ) -> None:
        self.parameters = parameters
        self._axis = axis
        self._replicas = replicas
        self._context = context
        self._on_complete = on_complete
        self._shardings = [_Sharding(parameter, axis) for parameter in parameters]
        total = sum(parameter.numel() for parameter in parameters)
        self._flat = torch.zeros(total, dtype=torch.float32, device=context.device)
        self._main_grads = _views(self._flat, [parameter.shape for parameter in parameters])
        self.row = sum(_numel(sharding.padded_shape) for sharding in self._shardings)
        self._reduced = self._flat if axis.size == 1 else self._flat.new_zeros(self.row)
        self._missing = 0
        self._scattering: Pending | None = None
        self._summing: Pending | None = None
        self._gathering: Pending | None = None
        self._short_shards: list[tuple[Tensor, Tensor]] = []
        self.owned = self._own()
        for parameter, main_grad in zip(parameters, self._main_grads, strict=True):
            parameter.main_grad = MainGrad(main_grad, self._register_grad_ready)  # type: ignore[attr-defined]
            if parameter.dtype == torch.float32:  # autograd adds straight into the bucket
                parameter.grad = main_grad
            parameter.register_post_accumulate_grad_hook(self._from_autograd)

    def _own(self) -> list[ParameterShard]:
        shards = _views(self._reduced, [sharding.padded_shape for sharding in self._shardings])
        owned = []
        for parameter, sharding, padded in zip(self.parameters, self._shardings, shards, strict=True):
            is_master = self._axis.size == 1 and parameter.dtype == torch.float32
            master = parameter.data if is_master else sharding.shard(parameter.data).to(torch.float32, copy=True)
            gradient = self._contiguous(sharding.trim(padded))
            owned.append(ParameterShard(layout_of(parameter), parameter, master, gradient))
        return owned

    def _contiguous(self, trimmed: Tensor) -> Tensor:
        """Fused optimizers walk through memory, so a shard that padding has cut apart gets memory of its own."""
        if trimmed.is_contiguous():
            return trimmed
        own = torch.zeros_like(trimmed, memory_format=torch.contiguous_format)
        self._short_shards.append((own, trimmed))
        return own

    @property
    def is_complete(self) -> bool:
        """Whether every gradient of the step has arrived."""
        return self._missing == 0

    def begin_step(self, micro_batches: int) -> None:
        """Zeroes the gradients; each micro-batch will bring every parameter's contributions."""
        self._flat.zero_()
        self._missing = micro_batches * sum(layout_of(parameter).grad_contributions for parameter in self.parameters)

    def _from_autograd(self, parameter: Tensor) -> None:
        total = parameter.main_grad.total  # type: ignore[attr-defined]
        if parameter.grad is not total:
            assert parameter.grad is not None, "the hook runs after the gradient was stored"
            total.add_(parameter.grad)
            parameter.grad = None
        self._register_grad_ready()

    def _register_grad_ready(self) -> None:
        self._missing -= 1
        assert self._missing >= 0, "more gradients than micro-batches"
        if self._missing == 0:
            self._on_complete(self)

    @torch.no_grad()
    def start_grad_sync(self) -> None:
        """Begins to cut the sum over the ranks of the axis into shards."""
        if self._axis.group is None:
            self._scattering = Pending(self._reduced)
            return
        buffer = self._flat.new_empty(self._axis.size, self.row)
        self._pack(
            buffer,
            [sharding.all_shards(grad) for sharding, grad in zip(self._shardings, self._main_grads, strict=True)],
        )
        work = dist.reduce_scatter_single(self._reduced, buffer.view(-1), group=self._axis.group, async_op=True)
        self._scattering = Pending(self._reduced, work, buffer)

    def start_replica_all_reduce(self) -> None:
        """Begins to sum the shards over the replicas, once they are there."""
        if self._summing is not None:
            return
        assert self._scattering is not None, "the reduction was not started"
        shards = self._scattering.wait()
        group = self._replicas.group
        work = None if group is None else dist.all_reduce(shards, group=group, async_op=True)
        self._summing = Pending(shards, work)

    def finish_grad_sync(self) -> None:
        """Waits for the sums."""
        assert self._summing is not None, "the replicas' sum was not started"
        self._summing.wait()
        self._scattering = self._summing = None
        for own, trimmed in self._short_shards:
            own.copy_(trimmed)

    def start_param_sync(self) -> None:
        """Begins to gather the masters of all ranks into the parameters."""
        if self._axis.group is None:
            for item in self.owned:
                if item.master.dtype != item.parameter.dtype:  # else they are one
                    item.parameter.copy_(item.master)
            return
        dtype = self.parameters[0].dtype
        row = torch.zeros(self.row, dtype=dtype, device=self._context.device)
        shards = _views(row, [sharding.padded_shape for sharding in self._shardings])
        for item, sharding, padded in zip(self.owned, self._shardings, shards, strict=True):
            sharding.trim(padded).copy_(item.master)
        gathered = row.new_empty(self._axis.size, self.row)
        work = dist.all_gather_single(gathered.view(-1), row, group=self._axis.group, async_op=True)
        self._gathering = Pending(gathered, work, row)

    @torch.no_grad()
    def finish_param_sync(self) -> None:
        """Waits until the parameters hold the updated weights."""
        if self._gathering is None:
            return
        gathered, self._gathering = self._gathering.wait(), None
        offset = 0
        for parameter, sharding in zip(self.parameters, self._shardings, strict=True):
            size = _numel(sharding.padded_shape)
            columns = gathered[:, offset : offset + size].unflatten(1, sharding.padded_shape)
            parameter.copy_(sharding.unshard(columns))
            offset += size

    @staticmethod
    def _pack(buffer: Tensor, shards: list[Tensor]) -> None:
        offset = 0
        for each in shards:
            size = _numel(each.shape[1:])
            buffer[:, offset : offset + size].unflatten(1, each.shape[1:]).copy_(each)
            offset += size


def _numel(shape: Iterable[int]) -> int:
    return torch.Size(tuple(shape)).numel()


def _views(flat: Tensor, shapes: Iterable[Iterable[int]]) -> list[Tensor]:
    """Consecutive views of a flat tensor, shaped."""
    views, offset = [], 0
    for shape in shapes:
        size = _numel(shape)
        views.append(flat[offset : offset + size].view(torch.Size(tuple(shape))))
        offset += size
    return views
