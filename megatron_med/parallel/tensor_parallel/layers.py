"""Linear layers and the embedding, cut over tensor-parallel ranks (Shoeybi et al. 2019).

A parallel linear is three steps: collective, local product, collective. Groups come in through the context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_med.kernels.linear import DenseLinear, LocalLinear
from megatron_med.kernels.packed import PackedLinear, can_pack, pack
from megatron_med.parallel.collectives import reduce_from_tensor_parallel
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import ParameterLayout, RowBlocks, layout_of, make_parameter
from megatron_med.parallel.pipeline_parallel.weight_grad_store import WeightGradStore
from megatron_med.parallel.tensor_parallel.head_loss import HeadLoss, vocab_parallel_head_loss
from megatron_med.parallel.tensor_parallel.int8 import int8_row_parallel
from megatron_med.parallel.tensor_parallel.linear import InputMode, LinearPlan, parallel_linear
from megatron_med.parallel.tensor_parallel.lora import ColumnParallelLoRA, LoRA, LoRASettings, Place, RowParallelLoRA
from megatron_med.parallel.tensor_parallel.new_rows import EmbeddingRows, HeadRows
from megatron_med.parallel.tensor_parallel.quantized import Int8Weight, QuantizedWeight


class ParallelLinear(nn.Module):
    """What column- and row-parallel linears share: the local product, and where deferred weight gradients go.

    Attributes:
        local: the products, for the format of the weight.
        quantized: the weight in few bits; then there is no parameter of that name.
        packed: the weight in a layout that is only read; then there is no parameter, either.
        lora: adapters beside the weight, where there are some.
        new_rows: trained rows of the head, where there are some.
        weight_grads: takes deferred weight gradients; see ``share_weight_grad_store``.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, context: ParallelContext) -> None:
        super().__init__()
        self.context = context
        self.local: LocalLinear = DenseLinear()
        self.quantized: QuantizedWeight | None
        self.register_module("quantized", None)
        self.packed: Tensor | None = None
        self.lora: LoRA | None
        self.register_module("lora", None)
        self.new_rows: HeadRows | None
        self.register_module("new_rows", None)
        self.weight_grads = WeightGradStore()

    def product(self, x: Tensor, bias: Tensor | None, mode: InputMode) -> Tensor:
        """The autograd function on this rank's shard of the weight."""
        plan = LinearPlan(self.local, mode, self.context, self.weight_grads)
        return parallel_linear(x, self._operand(), bias, plan)

    def _operand(self) -> Tensor:
        if self.quantized is not None:
            return self.quantized.codes
        if self.packed is not None:
            return self.packed
        assert self.weight is not None, "a weight is quantised or a parameter"
        return self.weight

    @property
    def weight_layout(self) -> ParameterLayout:
        """The weight's layout, whatever its format."""
        return layout_of(self._operand()) if self.quantized is None else self.quantized.layout

    @property
    def dtype(self) -> torch.dtype:
        """Type that the products are in."""
        return self._operand().dtype if self.quantized is None else self.quantized.dtype

    def quantize(self, weight: QuantizedWeight) -> None:
        """Puts a weight in few bits into the place of the parameter, which is given up."""
        self.weight = None
        self.quantized = weight
        self.local = weight.local_linear()

    def pack(self) -> None:
        """Puts the weight into the layout that is fastest to read, where this machine has one. Nothing can be trained,
        loaded or saved afterwards."""
        if self.weight is not None and can_pack(self.weight):
            self.packed = pack(self.weight)
            self.weight = None
            self.local = PackedLinear()

    def adapted(self, x: Tensor, out: Tensor, dropout_key: str) -> Tensor:
        """``out`` with what is trained beside the weight, for the input ``x``."""
        if self.new_rows is not None:
            out = self.new_rows(x, out)
        return out if self.lora is None else self.lora(x, out, dropout_key)


def pack_weights(module: nn.Module) -> None:
    """Packs the weights of all parallel linears, one after the other; a tied embedding keeps its own."""
    for part in module.modules():
        if isinstance(part, ParallelLinear):
            part.pack()


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
        parts: named parts of the weight's rows, all ``parts * out`` of them; ``bias`` has the same ones.
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
        parts: Mapping[str, RowBlocks] | None = None,
        weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__(context)
        self.parts = parts or {}
        tp_dim = len(shape) - 2
        rows = self.rows_of_parts(math.prod(shape[:-1]))
        layout = ParameterLayout(shape, tp_dim=tp_dim, dp_dim=tp_dim, parts=rows, init_std=init_std)
        self.weight = make_parameter(layout, context, dtype) if weight is None else weight
        self.bias = None
        if bias:
            bias_layout = ParameterLayout(
                shape[:-1],
                tp_dim=tp_dim,
                dp_dim=tp_dim,
                parts=rows,
                weight_decay=False,
                init="zeros",
            )
            self.bias = make_parameter(bias_layout, context, dtype)

    def rows_of_parts(self, total: int) -> dict[str, Tensor]:
        """Indices of each named part among the ``total`` rows of the whole weight."""
        return {name: blocks.rows(total) for name, blocks in self.parts.items()}

    def add_lora(self, targets: Mapping[str, str | None], settings: LoRASettings, region: str) -> None:
        """Adapters for named parts of the weight.

        Args:
            targets: name of each adapter, and its part; None: the whole weight.
            settings: of all adapters.
            region: names the dropout masks.
        """
        shape = self.weight_layout.global_shape
        total = math.prod(shape[:-1])
        places: dict[str, Place] = {}
        for name, part in targets.items():
            if part is None:
                places[name] = Place(total, self.rows_of_parts(total), None)
            else:
                blocks = self.parts[part]
                places[name] = Place(
                    blocks.count(total), {}, blocks if len(shape) == 2 else blocks.cut(self.context.tp)
                )
        self.lora = ColumnParallelLoRA(places, shape[-1], settings, self.context, self.dtype, region)

    @property
    def _mode(self) -> InputMode:
        if self.context.tp.size == 1:
            return "local"
        return "gather" if self.context.sequence_parallel else "copy"

    def forward(self, x: Tensor, dropout_key: str = "") -> Tensor:
        return self.adapted(x, self.product(x, self.bias, self._mode), dropout_key)


class VocabParallelHead(ColumnParallelLinear):
    """``[seq(/tp), batch, hidden] -> [seq, batch, padded_vocab/tp]``: the vocabulary is cut."""

    @property
    def can_give_loss(self) -> bool:
        """Whether ``loss`` serves: nothing is trained beside the weight, and that is read as it is."""
        return self.weight is not None and self.lora is None and self.new_rows is None

    def loss(self, x: Tensor, targets: Tensor, mask: Tensor, vocab_size: int, scale: Tensor | None) -> Tensor:
        """Sum of the masked losses of all tokens, without logits that are whole; see ``vocab_parallel_head_loss``.

        Args:
            x: ``[seq(/tp), batch, hidden]``.
            targets, mask: ``[seq, batch]``, ids in the whole vocabulary, and the factors of their losses.
            vocab_size: without the padding.
            scale: the gradient that the loss will get; None: no backward pass follows.
        """
        assert self.weight is not None, "a head that can give the loss has a weight"
        plan = HeadLoss(self.local, self._mode, self.context.tp, vocab_size, scale)
        return vocab_parallel_head_loss(x, self.weight, targets, mask, plan)


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

    def add_lora(self, targets: Mapping[str, str | None], settings: LoRASettings, region: str) -> None:
        """Adapters for the whole weight; see ``ColumnParallelLinear.add_lora``."""
        rows, width = self.weight_layout.global_shape
        places = dict.fromkeys(targets, Place(rows, {}, None))
        self.lora = RowParallelLoRA(places, width, settings, self.context, self.dtype, region)

    def forward(self, x: Tensor, dropout_key: str = "") -> Tensor:
        summed = None
        if isinstance(self.quantized, Int8Weight) and self.context.tp.size > 1:
            partial, summed = int8_row_parallel(x, self.quantized, self.context)
        else:
            partial = self.product(x, None, "local")
        partial = self.adapted(x, partial, dropout_key)
        out = reduce_from_tensor_parallel(partial, self.context.tp, self.context.sequence_parallel)
        if summed is not None:
            out = out + summed
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
        self.new_rows: EmbeddingRows | None
        self.register_module("new_rows", None)
        layout = ParameterLayout(
            shape, tp_dim=0, shared=shared, grad_contributions=grad_contributions, init_std=init_std
        )
        self.weight = make_parameter(layout, context, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.t()
        out = self._lookup(tokens)
        return out if self.new_rows is None else self.new_rows(tokens, out)

    def _lookup(self, tokens: Tensor) -> Tensor:
        tp = self.context.tp
        if tp.size == 1:
            return F.embedding(tokens, self.weight)
        rows = self.weight.shape[0]
        local = tokens - tp.rank * rows
        out_of_range = (local < 0) | (local >= rows)
        embedded = F.embedding(local.masked_fill(out_of_range, 0), self.weight)
        embedded = embedded.masked_fill(out_of_range.unsqueeze(-1), 0)
        return reduce_from_tensor_parallel(embedded, tp, self.context.sequence_parallel)

    def train_rows(self, tokens: range) -> None:
        """From now on the rows of these tokens are trained; ``head_rows`` makes the same of the head."""
        layout = layout_of(self.weight)
        weight = _row_differences(layout, tokens, self.context, self.weight.dtype)
        self.new_rows = EmbeddingRows(tokens, weight, self.context)


def head_rows(head: ColumnParallelLinear, tokens: range, embedding: VocabParallelEmbedding | None) -> HeadRows:
    """Trained rows for a head; those of ``embedding`` where it is tied to that."""
    if embedding is not None and embedding.new_rows is not None:
        return HeadRows(tokens, embedding.new_rows.weight, head.context)
    weight = _row_differences(head.weight_layout, tokens, head.context, head.dtype)
    return HeadRows(tokens, weight, head.context)


def _row_differences(
    vocabulary: ParameterLayout, tokens: range, context: ParallelContext, dtype: torch.dtype
) -> nn.Parameter:
    """Zeros, shared by the stages that share the vocabulary. Autograd joins what embedding and head give."""
    layout = ParameterLayout(
        (len(tokens), vocabulary.global_shape[-1]),
        partial_over_tp=context.sequence_parallel,
        shared=vocabulary.shared,
        adapter=True,
        weight_decay=False,
        init="zeros",
    )
    return make_parameter(layout, context, dtype)


def replicated_layout(
    shape: tuple[int, ...], init: Literal["ones", "zeros"], context: ParallelContext
) -> ParameterLayout:
    """A vector that every tensor-parallel rank holds whole: norms and row-parallel biases.

    Under sequence parallelism a rank sees its part of the sequence only, so its gradient is partial.
    """
    return ParameterLayout(shape, partial_over_tp=context.sequence_parallel, weight_decay=False, init=init)
