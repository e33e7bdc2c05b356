"""Low-rank adapters (Hu et al. 2021) beside a parallel linear: ``Y = X W^T + scale * dropout(X) A^T B^T``.

The factors are parameters of their own and the small products go through autograd; ``LocalLinear`` and the collectives
of the frozen weight know nothing of them. What travels for them is ``rank`` wide.

=========================  =================  ===================================  ==================
linear                     A                  between A and B                      B
=========================  =================  ===================================  ==================
column, sequence parallel  whole, summed      all-gather of the sequence           cut by its outputs
column                     whole              Megatron's f                         cut by its outputs
row                        cut by its inputs  nothing: ``B A x`` adds up over the  whole, summed
                                              ranks like ``W x``
=========================  =================  ===================================  ==================

"Summed": a rank computes only a part of its gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from megatron_med.parallel.collectives import copy_to_tensor_parallel
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import ParameterLayout, RowBlocks, make_parameter
from megatron_med.parallel.random import DropoutRegion


@dataclass(frozen=True)
class LoRASettings:
    """What all adapters of a model share.

    Attributes:
        rank: rows of A, columns of B.
        scale: factor of the product.
        dropout: probability, of A's input.
        lr_scale_b: factor of B's learning rate.
    """

    rank: int
    scale: float
    dropout: float
    lr_scale_b: float


@dataclass(frozen=True)
class Place:
    """Where a target's outputs lie among those of its linear.

    Attributes:
        rows: of the whole weight that are the target's.
        parts: named parts of these rows.
        blocks: of this rank's outputs that are the target's; None: all of them.
    """

    rows: int
    parts: Mapping[str, Tensor]
    blocks: RowBlocks | None


class LoRA(nn.Module, ABC):
    """The adapters of one linear. Parameters are ``<target>_A [rank, in]`` and ``<target>_B [out, rank]``.

    A is drawn uniformly within 1 / sqrt(in) and B is zero, as in PEFT: an untrained adapter changes nothing. Targets of
    one linear share the dropped input, as in the paper's own code.

    Args:
        places: of each target, by its name.
        width: inputs of the whole weight.
        settings: of all adapters.
        context: the grid.
        dtype: of the weights.
        region: names the dropout masks.
    """

    def __init__(
        self,
        places: Mapping[str, Place],
        width: int,
        settings: LoRASettings,
        context: ParallelContext,
        dtype: torch.dtype,
        region: str,
    ) -> None:
        super().__init__()
        self.context = context
        self.settings = settings
        self.places = places
        self.dropout = DropoutRegion(settings.dropout, region, self.input_shard())
        for name, place in places.items():
            for factor, layout in (("A", self.layout_a(width)), ("B", self.layout_b(place))):
                parameter = make_parameter(replace(layout, adapter=True), context, dtype)
                self.register_parameter(f"{name}_{factor}", parameter)

    @abstractmethod
    def input_shard(self) -> int:
        """Coordinate of this rank's shard of the input; 0 where all tensor-parallel ranks hold the same."""

    @abstractmethod
    def layout_a(self, width: int) -> ParameterLayout:
        """Of A."""

    @abstractmethod
    def layout_b(self, place: Place) -> ParameterLayout:
        """Of B."""

    @abstractmethod
    def between(self, low: Tensor) -> Tensor:
        """From the products with A to what B takes."""

    def forward(self, x: Tensor, out: Tensor, dropout_key: str) -> Tensor:
        """
        Args:
            x: input of the linear.
            out: its product with the frozen weight, ``[seq, batch, out(/tp)]``; the adapters' is added in place.
            dropout_key: names the micro-batch.
        """
        low = F.linear(self.dropout(x, dropout_key, self.training), torch.cat(self.factors("A")))
        low = self.between(low * self.settings.scale)
        factors = zip(low.split(self.settings.rank, dim=-1), self.factors("B"), strict=True)
        deltas = [F.linear(part, factor) for part, factor in factors]
        return AddToBlocks.apply(out, [place.blocks for place in self.places.values()], *deltas)

    def factors(self, which: str) -> list[Tensor]:
        """A or B of every target."""
        return [cast(Tensor, getattr(self, f"{name}_{which}")) for name in self.places]


class ColumnParallelLoRA(LoRA):
    """``x [seq(/tp), batch, in]``, outputs cut."""

    def input_shard(self) -> int:
        return self.context.tp.rank if self.context.sequence_parallel else 0

    def layout_a(self, width: int) -> ParameterLayout:
        std = 1 / math.sqrt(3 * width)
        partial = self.context.sequence_parallel
        return ParameterLayout((self.settings.rank, width), partial_over_tp=partial, init="uniform", init_std=std)

    def layout_b(self, place: Place) -> ParameterLayout:
        shape = (place.rows, self.settings.rank)
        return ParameterLayout(shape, tp_dim=0, parts=place.parts, lr_scale=self.settings.lr_scale_b, init="zeros")

    def between(self, low: Tensor) -> Tensor:
        return copy_to_tensor_parallel(low, self.context.tp, self.context.sequence_parallel)


class RowParallelLoRA(LoRA):
    """``x [seq, batch, in/tp]``, partial results that are summed with those of the frozen weight."""

    def input_shard(self) -> int:
        return self.context.tp.rank

    def layout_a(self, width: int) -> ParameterLayout:
        std = 1 / math.sqrt(3 * width)
        return ParameterLayout((self.settings.rank, width), tp_dim=1, init="uniform", init_std=std)

    def layout_b(self, place: Place) -> ParameterLayout:
        shape = (place.rows, self.settings.rank)
        return ParameterLayout(shape, partial_over_tp=True, lr_scale=self.settings.lr_scale_b, init="zeros")

    def between(self, low: Tensor) -> Tensor:
        return low


class AddToBlocks(Function):
    """Forward: adds each delta to its blocks of ``out``, in place. Backward: the gradient, and its blocks."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, places: Sequence[RowBlocks | None], *deltas: Tensor) -> Tensor:
        ctx.mark_dirty(out)
        ctx.places = places
        for place, delta in zip(places, deltas, strict=True):
            if place is None:
                out.add_(delta)
            else:
                blocks = place.of(out)
                blocks.add_(delta.reshape(blocks.shape))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        blocks = (grad if place is None else place.of(grad).flatten(-2) for place in ctx.places)
        return grad, None, *blocks
