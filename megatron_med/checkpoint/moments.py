"""Optimizer states in 8 bit on another grid, and from or to 32 bit.

A checkpoint holds the codes of a moment as one tensor of the parameter's shape, and the maxima of its blocks as
``[tensor ranks, data ranks, blocks]``: blocks run through the slices of the grid that saved it. Where a block of this
run's slice is one of those, its code and maximum are taken as they are; else its values are quantised again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_med.checkpoint.storage import Reader, load_entries
from megatron_med.checkpoint.views import GlobalViews, moment_name
from megatron_med.errors import CheckpointError
from megatron_med.kernels.blockwise import BLOCK, blocks_of, dequantize_blocks, dynamic_codes, quantize_blocks
from megatron_med.optim.adamw8bit import SIGNED, maxima_name
from megatron_med.optim.optimizer import Optimizer
from megatron_med.parallel.collectives import gather_objects
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.data_parallel.base import ParameterShard
from megatron_med.parallel.parameters import ParameterLayout

Box = list[tuple[int, int]]
"""Start and stop of each dimension of the whole tensor."""


@dataclass
class Conversion:
    """What became of 8-bit states while they were loaded.

    Attributes:
        to_32, to_8: parameters whose moments changed their form.
        blocks, again: blocks of 256 that were 8 bit before and after, and how many of them were quantised again.
        error: largest change of a moment by that, Euclidean norm over the slice's own.
    """

    to_32: int = 0
    to_8: int = 0
    blocks: int = 0
    again: int = 0
    error: float = 0.0

    def lines(self) -> Iterator[str]:
        """What a user is told."""
        if self.to_32:
            yield f"the moments of {self.to_32} parameters were in 8 bit and go on in 32 bit"
        if self.to_8:
            yield f"the moments of {self.to_8} parameters were in 32 bit and go on in 8 bit"
        if self.again:
            yield (
                f"optimizer states in 8 bit: {self.again:,} of {self.blocks:,} blocks lie otherwise on this grid and "
                f"were quantised again; a moment changed by at most {100 * self.error:.2g} %"
            )


def stored_in_8_bit(reader: Reader, item: ParameterShard) -> bool:
    """Whether a checkpoint holds the moments of a parameter in 8 bit."""
    return moment_name(maxima_name("exp_avg"), item.layout.name) in reader.shapes()


def load_moments(
    folder: Path, reader: Reader, optimizer: Optimizer, context: ParallelContext, without: Collection[str]
) -> tuple[set[str], list[str]]:
    """Fills the moments of every parameter that is in 8 bit here or in the checkpoint.

    Returns:
        Names of these parameters, and what the user is to be told.
    """
    done, conversion = set(), Conversion()
    for item in optimizer.owned:
        name = item.layout.name
        here, there = optimizer.is_8_bit(item), stored_in_8_bit(reader, item)
        if name in without or not (here or there) or not item.master.numel():
            continue
        if moment_name("exp_avg", name) not in reader.shapes():
            raise CheckpointError(
                f"The checkpoint {folder} does not hold {moment_name('exp_avg', name)}. Load it with "
                "checkpoint.load_state: weights, or choose another one."
            )
        done.add(name)
        conversion.to_32 += there and not here
        conversion.to_8 += here and not there
        for moment in SIGNED:
            _load(reader, optimizer, item, moment, context, conversion)
    return done, _joined(conversion, context)


def _joined(mine: Conversion, context: ParallelContext) -> list[str]:
    """Of all ranks: the parameters of the rank that has most, and the blocks of all."""
    parts = gather_objects(mine, context.world)
    joined = Conversion(
        max(part.to_32 for part in parts),
        max(part.to_8 for part in parts),
        sum(part.blocks for part in parts),
        sum(part.again for part in parts),
        max(part.error for part in parts),
    )
    return list(joined.lines())


def _load(
    reader: Reader,
    optimizer: Optimizer,
    item: ParameterShard,
    moment: str,
    context: ParallelContext,
    conversion: Conversion,
) -> None:
    here, there = optimizer.is_8_bit(item), stored_in_8_bit(reader, item)
    name = moment_name(moment, item.layout.name)
    stored = torch.empty(item.master.shape, dtype=torch.uint8 if there else torch.float32)
    view = GlobalViews(context, "cpu").of_shard(stored, item.layout, optimizer.is_sharded)
    load_entries({name: view}, reader, no_dist=True)
    signed = SIGNED[moment]
    state = optimizer.states(item)
    if not there:
        codes, maxima = quantize_blocks(stored, signed)
    else:
        sources = _Sources(reader.read(moment_name(maxima_name(moment), item.layout.name)), item.layout)
        blocks, scales = sources.of(_box(item.layout, context, optimizer.is_sharded))
        values = dynamic_codes(signed, stored.device)[stored.int()] * scales
        if not here:
            state[moment].copy_(values)
            return
        codes, maxima = quantize_blocks(values, signed)
        aligned = sources.aligned(blocks)
        whole = aligned.repeat_interleave(BLOCK)[: stored.numel()].view(stored.shape)
        codes = torch.where(whole, stored, codes)
        firsts = scales.view(-1)[::BLOCK]
        maxima = torch.where(aligned, firsts, maxima)
        conversion.blocks += len(aligned)
        conversion.again += int((~aligned).sum())
        norm = values.norm()
        if norm > 0 and not aligned.all():
            change = (dequantize_blocks(codes, maxima, signed) - values).norm() / norm
            conversion.error = max(conversion.error, change.item())
    state[moment].copy_(codes)
    state[maxima_name(moment)].copy_(maxima)


def _box(layout: ParameterLayout, context: ParallelContext, is_sharded: bool) -> Box:
    data = (context.fsdp.rank, context.fsdp.size) if is_sharded else (0, 1)
    return layout.slice_of((context.tp.rank, context.tp.size), data)


class _Sources:
    """The slices that a moment was saved from, and their blocks, numbered through ``[tensor, data, blocks]``."""

    def __init__(self, maxima: Tensor, layout: ParameterLayout) -> None:
        self._maxima = maxima
        self._layout = layout

    def of(self, box: Box) -> tuple[Tensor, Tensor]:
        """For each value of a slice the number of the block that it was in, and that block's maximum."""
        shape = [stop - start for start, stop in box]
        numbers = torch.empty(shape, dtype=torch.int64)
        for index, source in self._slices():
            overlap = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, source, strict=True)]
            if all(start < stop for start, stop in overlap):
                here = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(overlap, box, strict=True))
                numbers[here] = _flat_indices(overlap, source).div_(BLOCK, rounding_mode="floor") + index
        return numbers, self._maxima.view(-1)[numbers]

    def aligned(self, numbers: Tensor) -> Tensor:
        """Which blocks of a slice, in the order of its memory, are blocks that were saved."""
        flat = numbers.view(-1)
        padded = torch.cat([flat, flat[-1:].expand(-len(flat) % BLOCK)]).view(-1, BLOCK)
        same = padded.amin(dim=1) == padded.amax(dim=1)
        lengths = torch.full((len(padded),), BLOCK)
        lengths[-1] = len(flat) - BLOCK * (len(padded) - 1)
        return same & (lengths == self._lengths()[padded[:, 0]])

    def _slices(self) -> Iterator[tuple[int, Box]]:
        tensor, data, blocks = self._maxima.shape
        for t in range(tensor):
            for d in range(data):
                yield (t * data + d) * blocks, self._layout.slice_of((t, tensor), (d, data))

    def _lengths(self) -> Tensor:
        """Values of each block."""
        lengths = torch.zeros(self._maxima.numel(), dtype=torch.int64)
        for index, source in self._slices():
            count = math.prod(stop - start for start, stop in source)
            own = blocks_of(count)
            lengths[index : index + own] = BLOCK
            if count % BLOCK:
                lengths[index + own - 1] = count % BLOCK
        return lengths


def _flat_indices(overlap: Box, source: Box) -> Tensor:
    """Place of each value of ``overlap`` in the memory of the slice ``source``."""
    flat = torch.zeros((), dtype=torch.int64)
    for (start, stop), (first, last) in zip(overlap, source, strict=True):
        flat = flat.unsqueeze(-1) * (last - first) + torch.arange(start - first, stop - first)
    return flat
