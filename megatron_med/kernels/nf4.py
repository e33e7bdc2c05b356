"""NF4 weights (Dettmers et al. 2023, QLoRA): 4-bit codes in blocks of 64, whose maxima are quantised themselves.

The code of a value is the nearest of 16 quantiles of a normal distribution. A block's largest absolute value, less the
mean of all of them, is kept in 8 bit (``blockwise.py``): 4.127 bits a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_med.kernels.backend import operation
from megatron_med.kernels.blockwise import AT_ONCE, dynamic_codes
from megatron_med.kernels.blockwise import BLOCK as GROUP
from megatron_med.kernels.linear import DenseLinear, LocalLinear
from megatron_med.kernels.opaque import Cost, opaque_operation

BLOCK = 64
"""Weights of a block."""

QUANTILES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""What the codes 0 to 15 stand for (appendix E of the paper)."""

_TINY = 1e-38


@cache
def _quantiles(device: torch.device) -> Tensor:
    return torch.tensor(QUANTILES, dtype=torch.float32, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Both values of a byte, the high half first, ``[256]``: two fp32 numbers in the memory of one fp64, which a
    look-up copies at once."""
    values = _quantiles(device)
    pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=1)
    return pairs.contiguous().view(torch.float64).view(-1)


def blocks_of(count: int) -> int:
    """Blocks of so many weights; the last one may be short."""
    return -(-count // BLOCK)


def quantize_nf4(values: Tensor, codes: Tensor, maxima: Tensor) -> None:
    """Fills codes and maxima, some values at a time.

    Args:
        values: contiguous, of any shape.
        codes: ``[ceil(n / 2)]`` uint8, two a byte.
        maxima: ``[blocks]`` fp32, largest absolute value of each block.
    """
    quantiles = _quantiles(values.device)
    borders = (quantiles[:-1] + quantiles[1:]) / 2
    flat = values.view(-1)
    for start in range(0, flat.numel(), AT_ONCE):
        part = flat[start : start + AT_ONCE].float()
        count = part.numel()
        rows = F.pad(part, (0, -count % BLOCK)).view(-1, BLOCK)
        largest = maxima[start // BLOCK : start // BLOCK + rows.shape[0]]
        torch.amax(rows.abs(), dim=1, out=largest)
        scaled = (rows * (1.0 / largest.clamp(min=_TINY)).unsqueeze(1)).clamp_(-1, 1).view(-1)[:count]
        found = torch.bucketize(F.pad(scaled, (0, count % 2)), borders, out_int32=True).to(torch.uint8)
        codes[start // 2 : (start + count + 1) // 2] = (found[::2] << 4) | found[1::2]


def _dequantize_fake(codes: Tensor, maxima: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(count, dtype=dtype)


def _dequantize_cost(codes: Tensor, maxima: Tensor, count: int, dtype: torch.dtype) -> Cost:
    return Cost(2.0 * count, codes.numel() + 4 * maxima.numel() + count * dtype.itemsize, 12 * min(count, AT_ONCE))


@operation
@opaque_operation(_dequantize_fake, _dequantize_cost)
def nf4_dequantize(codes: Tensor, maxima: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """What ``quantize_nf4`` gave -> the first ``count`` values, ``[count]`` in ``dtype``."""
    values = _dequantize_fake(codes, maxima, count, dtype)
    pairs = _pairs(codes.device)
    for start in range(0, count, AT_ONCE):
        end = min(count, start + AT_ONCE)
        found = pairs.index_select(0, codes[start // 2 : (end + 1) // 2].int()).view(torch.float32)[: end - start]
        rows = F.pad(found, (0, -found.numel() % BLOCK)).view(-1, BLOCK)
        rows *= maxima[start // BLOCK : start // BLOCK + rows.shape[0]].unsqueeze(1)
        values[start:end] = rows.view(-1)[: end - start]
    return values


def _maxima_fake(codes: Tensor, scales: Tensor, touched: Tensor, offset: Tensor, starts: Tensor, length: int) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


def _maxima_cost(codes: Tensor, scales: Tensor, touched: Tensor, offset: Tensor, starts: Tensor, length: int) -> Cost:
    return Cost(3.0 * codes.numel(), 5 * codes.numel(), 28 * codes.numel())


@opaque_operation(_maxima_fake, _maxima_cost)
def nf4_maxima(codes: Tensor, scales: Tensor, touched: Tensor, offset: Tensor, starts: Tensor, length: int) -> Tensor:
    """Largest absolute values of a rank's blocks from their own 8-bit form.

    Args:
        codes: ``[blocks]`` uint8.
        scales: of the groups of 256 blocks that these lie in, ``[groups]``.
        touched: numbers of these groups in the whole tensor, ascending, ``[groups]``.
        offset: mean of the whole tensor's maxima.
        starts: number, in the whole tensor, of the first block of each run of ``length`` blocks, ``[runs]``.
        length: blocks of a run.

    Returns:
        ``[blocks]`` fp32.
    """
    groups = block_numbers(starts, length).div_(GROUP, rounding_mode="floor")
    values = dynamic_codes(True, codes.device)[codes.int()]
    return values.mul_(scales[torch.searchsorted(touched, groups)]).add_(offset)


def block_numbers(starts: Tensor, length: int) -> Tensor:
    """Numbers of the blocks of runs that are ``length`` long."""
    return (starts.unsqueeze(1) + torch.arange(length, device=starts.device)).view(-1)


@dataclass
class NF4Linear(LocalLinear):
    """A frozen NF4 weight, dequantised for every product and let go of after it.

    Attributes:
        dequantized: the weight ``[out, in]`` in a type; the one that is passed is not looked at.
    """

    dequantized: Callable[[torch.dtype], Tensor]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        return DenseLinear().forward(x, self.dequantized(x.dtype), bias)

    def input_grad(self, weight: Tensor, saved: tuple[Tensor, ...], grad: Tensor) -> Tensor:
        return grad @ self.dequantized(grad.dtype)

    def weight_grad(
        self, x: Tensor, saved: tuple[Tensor, ...], grad: Tensor, out: Tensor | None = None
    ) -> Tensor | None:
        raise AssertionError("a quantised weight is frozen")
