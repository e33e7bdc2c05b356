"""Linear layers and the embedding, cut over tensor-parallel ranks (Shoeybi et al. 2019).

A parallel linear is three steps: collective, local product, collective. Groups come in through the context.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_med.kernels.linear import DenseLinear, LocalLinear
from megatron_med.parallel.collectives import reduce_from_tensor_parallel
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import ParameterLayout, make_parameter
from megatron_med.parallel.pipeline_parallel.weight_grad_store import WeightGradStore
from megatron_med.parallel.tensor_parallel.linear import InputMode, LinearPlan, parallel_linear


class ParallelLinear(nn.Module):
    """What column- and row-parallel linears share: the local product, and where deferred weight gradients go.

    Attributes:
        local: the products, for the format of the weight.
        weight_grads: takes deferred weight gradients; see ``share_weight_grad_store``.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, context: ParallelContext) -> None:
        super().__init__()
        self.context = context
        self.local: LocalLinear = DenseLinear()
        self.weight_grads = WeightGradStore()

    def product(self, x: Tensor, bias: Tensor | None, mode: InputMode) -> Tensor:
        """The autograd function on this rank's shard of the weight."""
        mode = mode if self.context.tp.size > 1 else "local"
        return parallel_linear(x, self.weight, bias, LinearPlan(self.local, mode, self.context, self.weight_grads))


def share_weight_grad_store(modules: Iterable[nn.Module], store: WeightGradStore) -> None:
    """From now on every parallel linear among ``modules`` defers its weight gradients to ``store``."""
    for module in modules:
        if isinstance(module, ParallelLinear):
            module.weight_grads = store


class ColumnParallelLinear(ParallelLinear):
    """``[seq(/tp), batch, in] -> [seq, batch, out/tp]``: the outputs are cut.

    Args:
        shape: global shape of the weight, ``(out, in)``, or ``(parts, out, in)`` where several products share
            the input: then the result is ``[seq, batch, parts * out/tp]``, part by part.
        parts: named parts of the weight's rows; ``bias`` has the same ones.
        weight: another module's weight to share instead of an own one (a tied head).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        context: ParallelContext,
        dtype: torch.dtype,
        *,
        bias: bool,
        init_std: float,
        parts: Mapping[str, Tensor] | None = None,
        weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__(context)
        tp_dim = len(shape) - 2
        layout = ParameterLayout(shape, tp_dim=tp_dim, dp_dim=tp_dim, parts=parts or {}, init_std=init_std)
        self.weight = make_parameter(layout, context, dtype) if weight is None else weight
        self.bias = None
        if bias:
            bias_layout = ParameterLayout(
                shape[:-1],
                tp_dim=tp_dim,
                dp_dim=tp_dim,
                parts=parts or {},
                weight_decay=False,
                init="zeros",
            )
            self.bias = make_parameter(bias_layout, context, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias, "gather" if self.context.sequence_parallel else "copy")


class RowParallelLinear(ParallelLinear):
    """``[seq, batch, in/tp] -> [seq(/tp), batch, out]``: the inputs are cut, the partial results summed."""

    def __init__(
        self,
        shape: tuple[int, int],
        context: ParallelContext,
        dtype: torch.dtype,
        *,
        bias: bool,
        init_std: float,
    ) -> None:
        super().__init__(context)
        self.weight = make_parameter(ParameterLayout(shape, tp_dim=1, dp_dim=0, init_std=init_std), context, dtype)
        self.bias = None
        if bias:
            self.bias = make_parameter(replicated_layout(shape[:1], "zeros", context), context, dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x, None, "local")
        out = reduce_from_tensor_parallel(out, self.context.tp, self.context.sequence_parallel)
        return out if self.bias is None else out + self.bias


class VocabParallelEmbedding(nn.Module):
    """Token ids ``[batch, seq]`` -> ``[seq(/tp), batch, hidden]``; each rank holds a range of the padded vocabulary."""

    def __init__(
        self,
        shape: tuple[int, int],
        context: ParallelContext,
        dtype: torch.dtype,
        *,
        init_std: float,
        shared: bool,
        grad_contributions: int = 1,
    ) -> None:
        super().__init__()
        self.context = context
        layout = ParameterLayout(
            shape, tp_dim=0, shared=shared, grad_contributions=grad_contributions, init_std=init_std
        )
        self.weight = make_parameter(layout, context, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        tp = self.context.tp
        tokens = tokens.t()
        if tp.size == 1:
            return F.embedding(tokens, self.weight)
        rows = self.weight.shape[0]
        local = tokens - tp.rank * rows
        out_of_range = (local < 0) | (local >= rows)
        embedded = F.embedding(local.masked_fill(out_of_range, 0), self.weight)
        embedded = embedded.masked_fill(out_of_range.unsqueeze(-1), 0)
        return reduce_from_tensor_parallel(embedded, tp, self.context.sequence_parallel)


def replicated_layout(
    shape: tuple[int, ...], init: Literal["ones", "zeros"], context: ParallelContext
) -> ParameterLayout:
    """A vector that every tensor-parallel rank holds whole: norms and row-parallel biases.

    Under sequence parallelism a rank sees its part of the sequence only, so its gradient is partial.
    """
    return ParameterLayout(shape, partial_over_tp=context.sequence_parallel, weight_decay=False, init=init)
