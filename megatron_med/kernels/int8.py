"""LLM.int8 (Dettmers et al. 2022): products of int8 inputs and weights, outlier features aside.

With ``c_x`` the largest absolute value of each input row and ``c_w`` that of each weight row (the column of the
transposed weight):

    Y = (Q_x Q_w^T) * c_x c_w^T / 127^2 + X_o W_o^T,     Q = round(127 * value / c)

where the int8 product is summed in int32, and ``o`` are the columns of X in which some value reaches a threshold. Two
published rules say what that means for the rest:

- bitsandbytes leaves only the values that reach it out of ``c_x``, and takes ``W_o`` from the int8 weights;
- the paper leaves the whole columns out of ``c_x``, and takes ``W_o`` in 16 bit.

Inputs and weights are rounded to fp16 first, as bitsandbytes does. Which columns are outliers depends on all rows of a
product: micro-batches of another size have others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_med.kernels.backend import operation
from megatron_med.kernels.linear import LocalLinear, own
from megatron_med.kernels.opaque import Cost, opaque_operation

LEVELS = 127
"""Of an int8 number, on either side of zero."""

_VALUES_AT_ONCE = 1 << 20
_CUDA_ROWS, _CUDA_MULTIPLE = 17, 8


def row_maxima(weight: Tensor) -> Tensor:
    """Largest absolute value of each row, ``[rows, columns] -> [rows]`` fp32; some rows at a time."""
    parts = weight.split(max(1, _VALUES_AT_ONCE // weight.shape[1]))
    return torch.cat([part.half().abs_().amax(dim=1).float() for part in parts])


def quantize_weight(weight: Tensor, maxima: Tensor, codes: Tensor) -> None:
    """Fills ``codes [rows, columns]`` int8, some rows at a time.

    Args:
        weight: ``[rows, columns]``.
        maxima: ``[rows]``, of the whole rows where the weight is a slice of their columns.
        codes: is written to.
    """
    rows = max(1, _VALUES_AT_ONCE // weight.shape[1])
    for part, largest, out in zip(weight.split(rows), maxima.split(rows), codes.split(rows), strict=True):
        out.copy_(_rounded(part.half(), largest))


def dequantize_weight(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``[rows, columns]``, from the codes and the maxima of the rows."""
    return (codes * scales.unsqueeze(1)).mul_(1 / LEVELS).to(dtype)


def _rounded(values: Tensor, maxima: Tensor) -> Tensor:
    """``[rows, columns]`` fp16 -> int8. A row of zeros stays one."""
    scale = torch.where(maxima > 0, LEVELS / maxima, 0).unsqueeze(1)
    return (values * scale).round_().to(torch.int8)


@operation
def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``[n, in] int8, [out, in] int8 -> [n, out] int32``, exact."""
    if not x.is_cuda:
        return torch._int_mm(x, weight.t())
    # cuBLAS wants more than 16 rows, and multiples of 8.
    rows, width = x.shape
    missing = max(_CUDA_ROWS, rows) - rows
    x = torch.nn.functional.pad(x, (0, -width % _CUDA_MULTIPLE, 0, missing + -(rows + missing) % _CUDA_MULTIPLE))
    padded = torch.nn.functional.pad(weight, (0, -width % _CUDA_MULTIPLE, 0, -weight.shape[0] % _CUDA_MULTIPLE))
    return torch._int_mm(x, padded.t())[:rows, : weight.shape[0]].contiguous()


def _maxima_fake(x: Tensor, threshold: float, whole_columns: bool) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _maxima_cost(x: Tensor, threshold: float, whole_columns: bool) -> Cost:
    count = x.numel()
    return Cost(3.0 * count, count * (x.element_size() + 8), count * 6)


@opaque_operation(_maxima_fake, _maxima_cost)
def int8_row_maxima(x: Tensor, threshold: float, whole_columns: bool) -> Tensor:
    """Scales of an input: largest absolute value of each row without outliers, ``[n, in] -> [n]`` fp32.

    Args:
        x: rows of features.
        threshold: what an outlier reaches; 0: there are none.
        whole_columns: leave out every value of a column with an outlier (the paper), not outliers alone.
    """
    sizes = x.half().abs()
    if threshold > 0:
        outliers = sizes >= threshold
        sizes.masked_fill_(outliers.any(dim=0) if whole_columns else outliers, 0)
    return sizes.amax(dim=1).float()


def _partial_fake(
    x: Tensor, codes: Tensor, scales: Tensor, maxima: Tensor, threshold: float, dense: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], codes.shape[0])
    return x.new_empty(shape, dtype=torch.int32), x.new_empty(shape)


def _partial_cost(
    x: Tensor, codes: Tensor, scales: Tensor, maxima: Tensor, threshold: float, dense: Tensor | None
) -> Cost:
    """The product counts as one; inputs are read, rounded and written once; few columns are outliers."""
    rows, width = x.shape
    out = rows * codes.shape[0]
    moved = x.numel() * (2 * x.element_size() + 8) + codes.numel() + out * (4 + 2 * x.element_size())
    return Cost(2.0 * out * width, moved, x.numel() * 8)


@opaque_operation(_partial_fake, _partial_cost)
def int8_partial_product(
    x: Tensor, codes: Tensor, scales: Tensor, maxima: Tensor, threshold: float, dense: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The two parts of a product, which add up over the ranks that cut the features.

    Args:
        x: ``[n, in]``.
        codes: of the weight, ``[out, in]`` int8.
        scales: of the weight, ``[out]``.
        maxima: of the rows of ``x``, over the features of all ranks.
        threshold: what an outlier reaches; 0: there are none.
        dense: the weight in 16 bit, for the outliers; None: they take the int8 one.

    Returns:
        int32 sums ``[n, out]``, and the outliers' product in the type of ``x``.
    """
    half = x.half()
    outliers = _outlier_columns(half, threshold)
    rounded = _rounded(half, maxima)
    del half
    _, rest = _partial_fake(x, codes, scales, maxima, threshold, dense)
    if outliers.numel():
        rounded[:, outliers] = 0
        torch.matmul(x[:, outliers], _outlier_weight(codes, scales, outliers, dense, x.dtype).t(), out=rest)
    else:
        rest.zero_()
    return int8_matmul(rounded, codes), rest


def _outlier_columns(half: Tensor, threshold: float) -> Tensor:
    """Indices; in ascending order."""
    if threshold <= 0:
        return torch.empty(0, dtype=torch.int64, device=half.device)
    return (half.abs() >= threshold).any(dim=0).nonzero().view(-1)


def _outlier_weight(codes: Tensor, scales: Tensor, columns: Tensor, dense: Tensor | None, dtype: torch.dtype) -> Tensor:
    if dense is not None:
        return dense[:, columns]
    return dequantize_weight(codes[:, columns], scales, dtype)


def dequantize_sums(sums: Tensor, maxima: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """int32 sums ``[n, out]`` and the scales of both sides -> values in ``dtype``."""
    rows = max(1, _VALUES_AT_ONCE // sums.shape[1])
    out = torch.empty_like(sums, dtype=dtype)
    for part, largest, target in zip(sums.split(rows), maxima.split(rows), out.split(rows), strict=True):
        target.copy_(part * (largest.unsqueeze(1) * scales).mul_(1 / LEVELS**2))
    return out


def _linear_fake(
    x: Tensor, codes: Tensor, scales: Tensor, threshold: float, dense: Tensor | None, whole_columns: bool
) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _linear_cost(
    x: Tensor, codes: Tensor, scales: Tensor, threshold: float, dense: Tensor | None, whole_columns: bool
) -> Cost:
    flat = x.flatten(0, -2)
    partial = _partial_cost(flat, codes, scales, scales, threshold, dense)
    out = flat.shape[0] * codes.shape[0]
    return Cost(partial.flops, partial.bytes + 8 * out, partial.workspace + 4 * out)


@opaque_operation(_linear_fake, _linear_cost)
def int8_linear(
    x: Tensor, codes: Tensor, scales: Tensor, threshold: float, dense: Tensor | None, whole_columns: bool
) -> Tensor:
    """``Y`` where one rank has all features: ``[..., in] -> [..., out]``; see ``int8_partial_product``."""
    flat = x.flatten(0, -2)
    maxima = int8_row_maxima(flat, threshold, whole_columns)
    sums, rest = int8_partial_product(flat, codes, scales, maxima, threshold, dense)
    rest += dequantize_sums(sums, maxima, scales, x.dtype)
    return own(rest, (*x.shape[:-1], codes.shape[0]))


@dataclass
class Int8Linear(LocalLinear):
    """A frozen int8 weight. The weight that is passed are its codes, ``[out, in]``.

    Attributes:
        scales: largest absolute value of each row of the whole weight, ``[out]`` fp32.
        threshold: what an outlier reaches; 0: there are none.
        dense: the weight in 16 bit, for outliers by the paper's rule; None: bitsandbytes' rule.
    """

    scales: Tensor
    threshold: float
    dense: Tensor | None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = int8_linear(x, weight, self.scales, self.threshold, self.dense, self.dense is not None)
        return (out if bias is None else out.add_(bias.flatten())), ()

    def input_grad(self, weight: Tensor, saved: tuple[Tensor, ...], grad: Tensor) -> Tensor:
        """With the dequantised weight, whatever was an outlier; the scales go onto the gradient, since int8 numbers are
        exact in every type."""
        if self.dense is not None:
            return grad @ self.dense
        return (grad * (self.scales * (1 / LEVELS))).to(grad.dtype) @ weight.to(grad.dtype)

    def weight_grad(
        self, x: Tensor, saved: tuple[Tensor, ...], grad: Tensor, out: Tensor | None = None
    ) -> Tensor | None:
        raise AssertionError("a quantised weight is frozen")
