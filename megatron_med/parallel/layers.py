"""Linear layers and the embedding, cut over tensor-parallel ranks (Shoeybi et al. 2019).

A parallel linear is three steps: collective, local product, collective. Groups come in through the context.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_med.parallel.collectives import leave_tensor_parallel
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import ParameterLayout, make_parameter
from megatron_med.parallel.product import Entry, parallel_product


class ColumnParallelLinear(nn.Module):
    """``[seq(/tp), batch, in] -> [seq, batch, out/tp]``: the outputs are cut.

    Args:
        name: canonical name without ``.weight``.
        shape: global shape of the weight, ``(out, in)``, or ``(pieces, out, in)`` where several products share
            the input: then the result is ``[seq, batch, pieces * out/tp]``, piece by piece.
        parts: named parts of the weight's rows; ``bias`` has the same ones.
        weight: another module's weight to share instead of an own one (a tied head).
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        context: ParallelContext,
        dtype: torch.dtype,
        *,
        bias: bool,
        init_std: float,
        parts: Mapping[str, Tensor] | None = None,
        weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.context = context
        tp_dim = len(shape) - 2
        layout = ParameterLayout(
            f"{name}.weight", shape, tp_dim=tp_dim, dp_dim=tp_dim, parts=parts or {}, init_std=init_std
        )
        self.weight = make_parameter(layout, context, dtype) if weight is None else weight
        self.bias = None
        if bias:
            bias_layout = ParameterLayout(
                f"{name}.bias",
                shape[:-1],
                tp_dim=tp_dim,
                dp_dim=tp_dim,
                parts=parts or {},
                weight_decay=False,
                init="zeros",
            )
            self.bias = make_parameter(bias_layout, context, dtype)

    def forward(self, x: Tensor) -> Tensor:
        entry: Entry = "gather" if self.context.sequence_parallel else "copy"
        return parallel_product(x, self.weight, self.bias, self.context, entry)


class RowParallelLinear(nn.Module):
    """``[seq, batch, in/tp] -> [seq(/tp), batch, out]``: the inputs are cut, the partial results summed."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        context: ParallelContext,
        dtype: torch.dtype,
        *,
        bias: bool,
        init_std: float,
    ) -> None:
        super().__init__()
        self.context = context
        layout = ParameterLayout(f"{name}.weight", shape, tp_dim=1, dp_dim=0, init_std=init_std)
        self.weight = make_parameter(layout, context, dtype)
        self.bias = None
        if bias:
            self.bias = make_parameter(replicated_layout(f"{name}.bias", shape[:1], "zeros", context), context, dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = parallel_product(x, self.weight, None, self.context, "none")
        out = leave_tensor_parallel(out, self.context.tp, self.context.sequence_parallel)
        return out if self.bias is None else out + self.bias


class VocabParallelEmbedding(nn.Module):
    """Token ids ``[batch, seq]`` -> ``[seq(/tp), batch, hidden]``; each rank holds a range of the padded vocabulary."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        context: ParallelContext,
        dtype: torch.dtype,
        *,
        init_std: float,
        shared: bool,
        uses: int = 1,
    ) -> None:
        super().__init__()
        self.context = context
        layout = ParameterLayout(f"{name}.weight", shape, tp_dim=0, shared=shared, uses=uses, init_std=init_std)
        self.weight = make_parameter(layout, context, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        tp = self.context.tp
        tokens = tokens.t()
        if tp.size == 1:
            return F.embedding(tokens, self.weight)
        rows = self.weight.shape[0]
        local = tokens - tp.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        embedded = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        embedded = embedded.masked_fill(elsewhere.unsqueeze(-1), 0)
        return leave_tensor_parallel(embedded, tp, self.context.sequence_parallel)


def replicated_layout(name: str, shape: tuple[int, ...], init: str, context: ParallelContext) -> ParameterLayout:
    """A vector that every tensor-parallel rank holds whole: norms and row-parallel biases.

    Under sequence parallelism a rank sees its part of the sequence only, so its gradient is partial.
    """
    return ParameterLayout(
        name,
        shape,
        partial_over_tp=context.sequence_parallel,
        weight_decay=False,
        init="ones" if init == "ones" else "zeros",
    )
