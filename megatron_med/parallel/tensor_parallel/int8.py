"""A row-parallel product with int8 weights that equals the one of a single rank.

The ranks agree on the maxima of the input's rows, and the int32 sums of all are added before they are dequantised, so
both are what one rank would have. Outlier columns need no agreement: a rank sees all rows of its features.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron_med.kernels.int8 import dequantize_sums, int8_partial_product, int8_row_maxima
from megatron_med.kernels.linear import own
from megatron_med.parallel.collectives import all_reduce, reduce_scatter_first_dim, split_first_dim
from megatron_med.parallel.context import Axis, ParallelContext
from megatron_med.parallel.tensor_parallel.quantized import Int8Weight


def int8_row_parallel(x: Tensor, weight: Int8Weight, context: ParallelContext) -> tuple[Tensor, Tensor]:
    """
    Args:
        x: ``[seq, batch, in/tp]``.
        weight: this rank's slice of every row.
        context: the grid.

    Returns:
        The outliers' products, ``[seq, batch, out]``, which are still to be summed over the ranks and carry the
        gradient of the input; and the int8 product, ``[seq(/tp), batch, out]``, summed, without a gradient.
    """
    rest, sums, maxima = _PartialProduct.apply(x, weight, context.tp)
    sums = sums.view(*x.shape[:-1], -1)
    maxima = maxima.view(x.shape[:-1])
    if context.sequence_parallel:
        sums, maxima = reduce_scatter_first_dim(sums, context.tp), split_first_dim(maxima, context.tp)
    else:
        sums = all_reduce(sums, context.tp)
    values = dequantize_sums(sums.flatten(0, -2), maxima.flatten(), weight.scales, x.dtype)
    return rest, values.view(sums.shape)


class _PartialProduct(Function):
    """Forward: outliers' product, int32 sums and agreed maxima. Backward: dX = dY W with the dequantised weight, all of
    it through the outliers' product: what is added to that has the same gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, tp: Axis) -> tuple[Tensor, Tensor, Tensor]:
        ctx.weight = weight
        rows = x.flatten(0, -2)
        maxima = int8_row_maxima(rows, weight.threshold, weight.dense is not None)
        all_reduce(maxima, tp, dist.ReduceOp.MAX)
        sums, rest = int8_partial_product(rows, weight.codes, weight.scales, maxima, weight.threshold, weight.dense)
        ctx.mark_non_differentiable(sums, maxima)
        return own(rest, (*x.shape[:-1], rest.shape[-1])), sums, maxima

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.weight.local_linear().input_grad(ctx.weight.codes, (), gradients[0]), None, None
