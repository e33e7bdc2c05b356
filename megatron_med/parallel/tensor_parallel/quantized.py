"""Frozen weights in few bits, cut over tensor-parallel ranks so that they are what one rank would have.

They are no parameters: neither gradients nor buckets nor full sharding know of them, and a checkpoint of adapters never
holds them. They are filled from the weights of the base, one after the other (``fill``).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_med.kernels import nf4
from megatron_med.kernels.blockwise import BLOCK as GROUP
from megatron_med.kernels.blockwise import quantize_blocks
from megatron_med.kernels.int8 import Int8Linear, dequantize_weight, quantize_weight, row_maxima
from megatron_med.kernels.linear import LocalLinear
from megatron_med.kernels.nf4 import NF4Linear
from megatron_med.parallel.collectives import all_reduce
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import ParameterLayout, RowBlocks


class QuantizedWeight(nn.Module, ABC):
    """A linear's weight in few bits, in buffers.

    Args:
        layout: of the weight, its canonical name included.
        dtype: that the model computes with, and that the weight is rounded to before it is quantised.
        context: the grid.
    """

    def __init__(self, layout: ParameterLayout, dtype: torch.dtype, context: ParallelContext) -> None:
        super().__init__()
        self.layout = layout
        self.dtype = dtype
        self.context = context
        self.width = layout.local_shape(context.tp)[-1]
        self.rows = math.prod(layout.local_shape(context.tp)[:-1])

    @property
    def is_cut_by_inputs(self) -> bool:
        """Whether each rank holds a slice of every row."""
        return self.context.tp.size > 1 and self.layout.tp_dim == len(self.layout.global_shape) - 1

    @property
    @abstractmethod
    def codes(self) -> Tensor:
        """What a linear's products are given in place of the weight."""

    @abstractmethod
    def local_linear(self) -> LocalLinear:
        """The products with this weight."""

    @abstractmethod
    def fill(self, weight: Tensor) -> None:
        """Quantises this rank's shard, in the layout's local shape and ``dtype``. All tensor-parallel ranks call it."""

    def is_finite(self) -> bool:
        """Whether all that was quantised are numbers: else a scale is none."""
        small = (buffer for name, buffer in self.named_buffers() if name.rsplit(".")[-1] in ("scales", "offset"))
        return all(bool(buffer.isfinite().all()) for buffer in small)

    @abstractmethod
    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as its products see it, ``[rows, in]``."""

    def _buffer(self, name: str, shape: Sequence[int] | None, dtype: torch.dtype) -> None:
        empty = None if shape is None else torch.empty(*shape, dtype=dtype, device=self.context.device)
        self.register_buffer(name, empty, persistent=False)


class Int8Weight(QuantizedWeight):
    """``[rows, in]`` int8 and a scale for each row, taken over the inputs of all ranks.

    Args:
        threshold: what outliers of the input reach.
        keeps_dense: keep the weight in 16 bit, too, for the outliers (the paper's rule).
    """

    scales: Tensor
    dense: Tensor | None

    def __init__(
        self,
        layout: ParameterLayout,
        dtype: torch.dtype,
        context: ParallelContext,
        *,
        threshold: float,
        keeps_dense: bool,
    ) -> None:
        super().__init__(layout, dtype, context)
        self.threshold = threshold
        self._buffer("values", (self.rows, self.width), torch.int8)
        self._buffer("scales", (self.rows,), torch.float32)
        self._buffer("dense", (self.rows, self.width) if keeps_dense else None, dtype)

    @property
    def codes(self) -> Tensor:
        return cast(Tensor, self.values)

    def local_linear(self) -> Int8Linear:
        return Int8Linear(self.scales, self.threshold, self.dense)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        matrix = weight.flatten(0, -2)
        maxima = row_maxima(matrix)
        if self.is_cut_by_inputs:
            maxima = all_reduce(maxima, self.context.tp, dist.ReduceOp.MAX)
        self.scales.copy_(maxima)
        quantize_weight(matrix, self.scales, self.codes)
        if self.dense is not None:
            self.dense.copy_(matrix)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return dequantize_weight(self.codes, self.scales, dtype)


@dataclass(frozen=True)
class StoredMatrix:
    """One of the tensors in Hugging Face's files that a linear's weight holds; it is quantised as a whole.

    Attributes:
        parts: rows of the whole weight, those of the tensor one after the other; none: the weight is the tensor.
    """

    parts: tuple[RowBlocks, ...] = ()


class NF4Weight(QuantizedWeight):
    """Codes of every stored matrix in its own order, its blocks' maxima in 8 bit, the scales of these, and their mean.

    A rank holds what belongs to its slice. The mean and the groups of 256 maxima are those of the whole matrix.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        dtype: torch.dtype,
        context: ParallelContext,
        matrices: Sequence[StoredMatrix],
    ) -> None:
        super().__init__(layout, dtype, context)
        self.pieces = nn.ModuleList(_Piece(self, matrix) for matrix in matrices)

    @property
    def codes(self) -> Tensor:
        return next(self._each()).codes

    def _each(self) -> Iterator[_Piece]:
        return iter(cast(Sequence[_Piece], self.pieces))

    def local_linear(self) -> NF4Linear:
        return NF4Linear(self.dequantized)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        for piece in self._each():
            piece.fill(weight.flatten(0, -2))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        if len(self.pieces) == 1 and not next(self._each()).parts:
            return next(self._each()).values(dtype)
        weight = torch.empty(self.rows, self.width, dtype=dtype, device=self.context.device)
        for piece in self._each():
            piece.put(piece.values(dtype), weight)
        return weight


class _Piece(nn.Module):
    """A rank's slice of one stored matrix."""

    codes: Tensor
    maxima: Tensor
    scales: Tensor
    touched: Tensor
    offset: Tensor
    starts: Tensor

    def __init__(self, weight: QuantizedWeight, matrix: StoredMatrix) -> None:
        super().__init__()
        layout, tp = weight.layout, weight.context.tp
        self.tp = tp
        self.by_inputs = weight.is_cut_by_inputs
        self.width = weight.width
        total = math.prod(layout.global_shape[:-1])
        rows_of_parts = [part.count(total) for part in matrix.parts] or [total]
        cut_rows = tp.size > 1 and not self.by_inputs
        self.local_rows = [rows // tp.size if cut_rows else rows for rows in rows_of_parts]
        inside = len(layout.global_shape) > 2  # the cut takes a slice of every block of rows
        self.parts = [part.cut(tp) if inside and cut_rows else part for part in matrix.parts]
        self.count = sum(self.local_rows) * self.width
        self.blocks_of_whole = nf4.blocks_of(sum(rows_of_parts) * layout.global_shape[-1])
        starts, self.length = self._runs(rows_of_parts, layout.global_shape[-1])
        blocks = len(starts) * self.length
        device = weight.context.device
        groups = np.unique((starts[:, None] + np.arange(self.length)) // GROUP)
        buffers = {
            "codes": torch.empty((self.count + 1) // 2, dtype=torch.uint8, device=device),
            "maxima": torch.empty(blocks, dtype=torch.uint8, device=device),
            "scales": torch.empty(len(groups), device=device),
            "offset": torch.empty((), device=device),
            "starts": torch.tensor(starts, device=device),
            "touched": torch.tensor(groups, device=device),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def _runs(self, rows_of_parts: list[int], width: int) -> tuple[np.ndarray, int]:
        """First blocks of the slice's runs of blocks in the whole matrix, and how long these are."""
        if self.by_inputs:
            first = self.tp.rank * nf4.blocks_of(self.width)
            return np.arange(sum(rows_of_parts)) * nf4.blocks_of(width) + first, nf4.blocks_of(self.width)
        if self.local_rows == rows_of_parts:
            return np.zeros(1, dtype=np.int64), self.blocks_of_whole
        (rows,) = set(self.local_rows)
        before = np.array([sum(rows_of_parts[:part]) for part in range(len(rows_of_parts))])
        return (before + self.tp.rank * rows) * width // nf4.BLOCK, nf4.blocks_of(rows * width)

    def fill(self, matrix: Tensor) -> None:
        """From this rank's rows of the weight."""
        own = self._taken(matrix)
        maxima = torch.empty(len(self.maxima), device=matrix.device)
        codes = self.codes.to(matrix.device)
        nf4.quantize_nf4(own, codes, maxima)
        self.codes.copy_(codes)
        numbers = nf4.block_numbers(self.starts, self.length)
        whole = torch.zeros(self.blocks_of_whole, device=matrix.device).index_copy_(0, numbers, maxima)
        if self.tp.size > 1:
            whole = all_reduce(whole, self.tp, dist.ReduceOp.MAX)
        offset = whole.mean()
        quantized, scales = quantize_blocks(whole - offset, True)
        self.offset.copy_(offset)
        self.maxima.copy_(quantized[numbers])
        self.scales.copy_(scales[self.touched])

    def _taken(self, matrix: Tensor) -> Tensor:
        """The slice in the stored matrix' order, contiguous."""
        if not self.parts:
            return matrix.contiguous()
        rows = [part.of(matrix.t()).permute(1, 2, 0).reshape(-1, self.width) for part in self.parts]
        return rows[0].contiguous() if len(rows) == 1 else torch.cat(rows)

    def values(self, dtype: torch.dtype) -> Tensor:
        """The slice, dequantised, ``[rows, in]``."""
        maxima = nf4.nf4_maxima(self.maxima, self.scales, self.touched, self.offset, self.starts, self.length)
        return nf4.nf4_dequantize(self.codes, maxima, self.count, dtype).view(-1, self.width)

    def put(self, values: Tensor, weight: Tensor) -> None:
        """Writes the slice to where it belongs in the rank's weight."""
        if not self.parts:
            weight.copy_(values)
            return
        for part, rows in zip(self.parts, values.split(self.local_rows), strict=True):
            part.of(weight.t()).copy_(rows.t().unflatten(-1, (-1, part.length)))


def quantized_weights(modules: nn.Module) -> Iterator[QuantizedWeight]:
    """All of them, in the order of the model."""
    return (module for module in modules.modules() if isinstance(module, QuantizedWeight))
