"""Gradient buckets over data-parallel ranks, and the pieces of parameters that the optimizer owns.

Gradients are summed, never averaged: the loss is divided by the token count of the whole global batch before the
backward pass. With ``sharding: optimizer`` (ZeRO-1, Rajbhandari et al. 2020) each rank keeps the slice of every
parameter along its declared dimension, so that optimizer states are ordinary sharded tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_med.parallel.context import Axis, ParallelContext
from megatron_med.parallel.parameters import ParameterLayout, layout_of, parameters_with_layout

BUCKET_ELEMENTS = 10_000_000
"""fp32 gradients that travel together: 40 MB, large enough for full bandwidth, small enough to overlap."""


@dataclass
class OwnedParameter:
    """The slice of one parameter that this rank's optimizer updates.

    Attributes:
        layout: what the parameter declares.
        parameter: the tensor-parallel piece that the model computes with.
        master: fp32 weights of the slice. The parameter itself where it is whole and fp32.
        gradient: fp32 gradient of the slice, summed over the data-parallel ranks after ``DataParallel.finish``.
    """

    layout: ParameterLayout
    parameter: nn.Parameter
    master: Tensor
    gradient: Tensor


class DataParallel:
    """Collects fp32 gradients in buckets, reduces each bucket as soon as it is complete, and hands updated
    weights back to the model.

    Args:
        module: this rank's stage.
        context: the grid.
        shard: cut gradients and masters over ``dp_shard``; else every rank keeps whole ones.
    """

    def __init__(self, module: nn.Module, context: ParallelContext, shard: bool) -> None:
        self._context = context
        axis = context.dp_shard if shard else Axis()
        trained = [parameter for layout, parameter in parameters_with_layout(module) if layout.trained]
        self._buckets = [_Bucket(parameters, axis, context) for parameters in _fill(reversed(trained))]
        owned = {id(item.parameter): item for bucket in self._buckets for item in bucket.owned}
        self.owned = [owned[id(parameter)] for parameter in trained]

    def zero_gradients(self) -> None:
        """Before the first micro-batch of a step."""
        for bucket in self._buckets:
            bucket.zero()

    def reduce_with_next_backward(self) -> None:
        """The next backward pass completes the gradients: reduce each bucket when its last one arrives."""
        for bucket in self._buckets:
            bucket.arm()

    @torch.no_grad()
    def finish(self) -> None:
        """Waits for the reductions, then sums what tensor-parallel ranks and tied stages hold in parts."""
        for bucket in self._buckets:
            bucket.wait()
        partial = [item.gradient for item in self.owned if item.layout.partial_over_tp]
        _all_reduce_together(partial, self._context.tp)
        if self._context.is_first_stage or self._context.is_last_stage:
            shared = [item.gradient for item in self.owned if item.layout.shared]
            _all_reduce_together(shared, self._context.embedding)

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the masters into the model's parameters, gathering the slices of other ranks."""
        for bucket in self._buckets:
            bucket.publish()

    def counts_in_norm(self, item: OwnedParameter) -> bool:
        """Whether this rank's slice is the one counted among its copies on other ranks."""
        context = self._context
        copies = [] if item.layout.tp_dim is not None else [context.tp]
        copies += [context.dp_replicate, context.cp]
        if item.gradient.shape == item.parameter.shape:  # not cut: every data-parallel rank holds it
            copies.append(context.dp_shard)
        if item.layout.shared:
            copies.append(context.embedding)
        return all(axis.is_first for axis in copies)


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


def _all_reduce_together(tensors: list[Tensor], axis: Axis) -> None:
    """One all-reduce for many small tensors, in place."""
    if axis.group is None or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=axis.group)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


class _Slicing:
    """How one parameter is cut over the ranks of ``axis``: ``torch.chunk``'s rule, the last pieces may be short."""

    def __init__(self, parameter: nn.Parameter, axis: Axis) -> None:
        self.dim = layout_of(parameter).dp_dim
        self.shape = parameter.shape
        self.axis = axis
        self.length = self.shape[self.dim]
        self.chunk = -(-self.length // axis.size)
        self.padding = self.chunk * axis.size - self.length
        self.piece_shape = (*self.shape[: self.dim], self.chunk, *self.shape[self.dim + 1 :])
        self.start = min(axis.rank * self.chunk, self.length)
        self.owned_length = min(self.chunk, self.length - self.start)

    def mine(self, tensor: Tensor) -> Tensor:
        """This rank's slice of a whole tensor (a view)."""
        return tensor.narrow(self.dim, self.start, self.owned_length)

    def trim(self, piece: Tensor) -> Tensor:
        """The owned part of a padded piece (a view)."""
        return piece.view(self.piece_shape).narrow(self.dim, 0, self.owned_length)

    def pieces(self, tensor: Tensor) -> Tensor:
        """A whole tensor -> ``[ranks, *piece_shape]``, padded with zeros."""
        if self.padding:
            after = [0, 0] * (tensor.dim() - 1 - self.dim) + [0, self.padding]
            tensor = F.pad(tensor, after)
        return tensor.unflatten(self.dim, (self.axis.size, self.chunk)).movedim(self.dim, 0)

    def whole(self, pieces: Tensor) -> Tensor:
        """``[ranks, *piece_shape]`` -> the whole tensor, padding removed."""
        joined = pieces.movedim(0, self.dim).flatten(self.dim, self.dim + 1)
        return joined.narrow(self.dim, 0, self.length)


class _Bucket:
    """Parameters whose gradients travel together.

    With slices the travelling buffer is ``[ranks, elements]``: row r holds rank r's slice of every parameter.
    The copy into it costs once a step.
    """

    def __init__(self, parameters: list[nn.Parameter], axis: Axis, context: ParallelContext) -> None:
        self._axis = axis
        self._context = context
        self._parameters = parameters
        self._slicings = [_Slicing(parameter, axis) for parameter in parameters]
        total = sum(parameter.numel() for parameter in parameters)
        self._flat = torch.zeros(total, dtype=torch.float32, device=context.device)
        self._main_grads = _views(self._flat, [parameter.shape for parameter in parameters])
        self._row = sum(_numel(slicing.piece_shape) for slicing in self._slicings)
        self._reduced = self._flat if axis.size == 1 else self._flat.new_zeros(self._row)
        self._waiting = 0
        self._armed = False
        self._works: list[dist.Work] = []
        self._short_slices: list[tuple[Tensor, Tensor]] = []
        self.owned = self._own()
        for parameter, main_grad in zip(parameters, self._main_grads, strict=True):
            _accumulate_into(parameter, main_grad)
            parameter.register_post_accumulate_grad_hook(self._gradient_arrived)

    def _own(self) -> list[OwnedParameter]:
        pieces = _views(self._reduced, [slicing.piece_shape for slicing in self._slicings])
        owned = []
        for parameter, slicing, piece in zip(self._parameters, self._slicings, pieces, strict=True):
            whole_fp32 = self._axis.size == 1 and parameter.dtype == torch.float32
            master = parameter.data if whole_fp32 else slicing.mine(parameter.data).to(torch.float32, copy=True)
            gradient = self._contiguous(slicing.trim(piece))
            owned.append(OwnedParameter(layout_of(parameter), parameter, master, gradient))
        return owned

    def _contiguous(self, trimmed: Tensor) -> Tensor:
        """Fused optimizers walk through memory, so a slice that padding has cut apart gets memory of its own."""
        if trimmed.is_contiguous():
            return trimmed
        own = torch.zeros_like(trimmed, memory_format=torch.contiguous_format)
        self._short_slices.append((own, trimmed))
        return own

    def zero(self) -> None:
        self._flat.zero_()

    def arm(self) -> None:
        self._armed = True
        self._waiting = len(self._parameters)

    def _gradient_arrived(self, parameter: Tensor) -> None:
        main_grad: Tensor = parameter.main_grad  # type: ignore[attr-defined]
        if parameter.grad is not main_grad:
            assert parameter.grad is not None, "the hook runs after the gradient was stored"
            main_grad.add_(parameter.grad)
            parameter.grad = None
        if self._armed:
            self._waiting -= 1
            if self._waiting == 0:
                self._start_reduction()

    @torch.no_grad()
    def _start_reduction(self) -> None:
        if self._axis.group is not None:
            buffer = self._flat.new_empty(self._axis.size, self._row)
            self._pack(buffer, [s.pieces(grad) for s, grad in zip(self._slicings, self._main_grads, strict=True)])
            self._launch(
                dist.reduce_scatter_single(self._reduced, buffer.view(-1), group=self._axis.group, async_op=True)
            )
            rest = self._context.dp_replicate
        else:
            rest = self._context.dp if self._axis.size == 1 else self._context.dp_replicate
        if rest.group is not None:
            self._wait_all()
            self._launch(dist.all_reduce(self._reduced, group=rest.group, async_op=True))

    def _launch(self, work: dist.Work | None) -> None:
        if work is not None:
            self._works.append(work)

    def _wait_all(self) -> None:
        for work in self._works:
            work.wait()
        self._works.clear()

    def wait(self) -> None:
        assert not self._armed or self._waiting == 0, f"{self._waiting} parameters got no gradient"
        self._armed = False
        self._wait_all()
        for own, trimmed in self._short_slices:
            own.copy_(trimmed)

    def publish(self) -> None:
        if self._axis.group is None:
            for item in self.owned:
                if item.master.data_ptr() != item.parameter.data_ptr():
                    item.parameter.copy_(item.master)
            return
        dtype = self._parameters[0].dtype
        row = torch.zeros(self._row, dtype=dtype, device=self._context.device)
        pieces = _views(row, [slicing.piece_shape for slicing in self._slicings])
        for item, slicing, piece in zip(self.owned, self._slicings, pieces, strict=True):
            slicing.trim(piece).copy_(item.master)
        gathered = row.new_empty(self._axis.size, self._row)
        dist.all_gather_single(gathered.view(-1), row, group=self._axis.group)
        offset = 0
        for parameter, slicing in zip(self._parameters, self._slicings, strict=True):
            size = _numel(slicing.piece_shape)
            columns = gathered[:, offset : offset + size].unflatten(1, slicing.piece_shape)
            parameter.copy_(slicing.whole(columns))
            offset += size

    @staticmethod
    def _pack(buffer: Tensor, pieces: list[Tensor]) -> None:
        offset = 0
        for piece in pieces:
            size = _numel(piece.shape[1:])
            buffer[:, offset : offset + size].unflatten(1, piece.shape[1:]).copy_(piece)
            offset += size


def _accumulate_into(parameter: nn.Parameter, main_grad: Tensor) -> None:
    """fp32: autograd adds straight into the bucket. Otherwise the hook adds each micro-batch's gradient."""
    parameter.main_grad = main_grad  # type: ignore[attr-defined]
    if parameter.dtype == torch.float32:
        parameter.grad = main_grad


def _numel(shape: Iterable[int]) -> int:
    return torch.Size(tuple(shape)).numel()


def _views(flat: Tensor, shapes: Iterable[Iterable[int]]) -> list[Tensor]:
    """Consecutive pieces of a flat tensor, shaped."""
    views, offset = [], 0
    for shape in shapes:
        size = _numel(shape)
        views.append(flat[offset : offset + size].view(torch.Size(tuple(shape))))
        offset += size
    return views
