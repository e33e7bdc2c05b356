"""Numbers in blocks, each a uint8 code times the largest absolute value of its block (Dettmers et al. 2021).

A value gets the code that is nearest to it. On a CPU it is first rounded to one of 65,536 equal steps from -1 to 1, for
which a table has the nearest code: so do bitsandbytes' kernels for the CPU, and one look-up is faster than a search.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from megatron_med.kernels.backend import operation
from megatron_med.kernels.opaque import Cost, opaque_operation

BLOCK = 256
"""Values of a block."""

AT_ONCE = 1 << 18
"""Values that are taken at a time: what is needed for them in fp32 stays in a CPU's cache. A multiple of ``BLOCK``."""

_EXPONENTS = 7
_STEPS = 65_535
_TINY = 1e-38


@cache
def dynamic_codes(signed: bool, device: torch.device) -> Tensor:
    """The 256 values that codes stand for, ascending, ``[256]`` fp32: the dynamic tree data type.

    For each power of ten from 1e-6 to 1 the middles of equal intervals between a tenth of it and itself, twice as many
    for each larger power; with ``signed`` their negatives, too; then 0 and 1.
    """
    values = [0.0, 1.0]
    for power in range(_EXPONENTS):
        intervals = 2**power if signed else 2 ** (power + 1)
        edges = torch.linspace(0.1, 1, intervals + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2
        scale = 10.0 ** (power + 1 - _EXPONENTS)
        values += (scale * middles).tolist()
        if signed:
            values += (-scale * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def _borders(signed: bool, device: torch.device) -> Tensor:
    """Above the n-th a value is nearer to code n + 1 than to code n."""
    codes = dynamic_codes(signed, device)
    return (codes[:-1] + codes[1:]) / 2


@cache
def _nearest(signed: bool) -> Tensor:
    """Code of each step from -1 to 1, ``[65536]``."""
    steps = torch.arange(_STEPS + 1, dtype=torch.float32) / _STEPS * 2 - 1
    return torch.bucketize(steps, _borders(signed, steps.device)).to(torch.uint8)


def _codes_of(scaled: Tensor, signed: bool) -> Tensor:
    """Codes of values between -1 and 1."""
    if scaled.device.type == "cpu":
        steps = ((scaled + 1) * (0.5 * _STEPS)).add_(0.5).int()
        return _nearest(signed).index_select(0, steps)
    return torch.bucketize(scaled, _borders(signed, scaled.device), out_int32=True).to(torch.uint8)


def blocks_of(count: int) -> int:
    """Blocks of so many values; the last one may be short."""
    return -(-count // BLOCK)


def _quantize_fake(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    maxima = values.new_empty(blocks_of(values.numel()), dtype=torch.float32)
    return torch.empty_like(values, dtype=torch.uint8, memory_format=torch.contiguous_format), maxima


def _quantize_cost(values: Tensor, signed: bool) -> Cost:
    count = values.numel()
    return Cost(10.0 * count, count * (values.element_size() + 1), 16 * min(count, AT_ONCE))


@operation
@opaque_operation(_quantize_fake, _quantize_cost)
def quantize_blocks(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Values of any shape, in blocks of 256 in the order of memory -> codes of the same shape and maxima ``[blocks]``.

    Args:
        values: fp32 or half precision, contiguous.
        signed: whether some may be negative.
    """
    codes, maxima = _quantize_fake(values, signed)
    flat, flat_codes = values.view(-1), codes.view(-1)
    for start in range(0, flat.numel(), AT_ONCE):
        part = flat[start : start + AT_ONCE].float()
        rows = _padded(part).view(-1, BLOCK)
        largest = maxima[start // BLOCK : start // BLOCK + rows.shape[0]]
        torch.amax(rows.abs(), dim=1, out=largest)
        scaled = rows * (1.0 / largest.clamp(min=_TINY)).unsqueeze(1)
        flat_codes[start : start + AT_ONCE] = _codes_of(scaled.clamp_(-1, 1).view(-1)[: part.numel()], signed)
    return codes, maxima


def _dequantize_fake(codes: Tensor, maxima: Tensor, signed: bool) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32, memory_format=torch.contiguous_format)


def _dequantize_cost(codes: Tensor, maxima: Tensor, signed: bool) -> Cost:
    count = codes.numel()
    return Cost(2.0 * count, 5 * count, 12 * min(count, AT_ONCE))


@operation
@opaque_operation(_dequantize_fake, _dequantize_cost)
def dequantize_blocks(codes: Tensor, maxima: Tensor, signed: bool) -> Tensor:
    """What ``quantize_blocks`` gave -> fp32 values of the shape of ``codes``."""
    values = _dequantize_fake(codes, maxima, signed)
    table = dynamic_codes(signed, codes.device)
    flat, flat_codes = values.view(-1), codes.view(-1)
    for start in range(0, flat.numel(), AT_ONCE):
        found = table.index_select(0, flat_codes[start : start + AT_ONCE].int())
        rows = _padded(found).view(-1, BLOCK)
        rows *= maxima[start // BLOCK : start // BLOCK + rows.shape[0]].unsqueeze(1)
        flat[start : start + AT_ONCE] = rows.view(-1)[: found.numel()]
    return values


def _padded(values: Tensor) -> Tensor:
    """With zeros up to whole blocks."""
    missing = -values.numel() % BLOCK
    return torch.nn.functional.pad(values, (0, missing)) if missing else values
