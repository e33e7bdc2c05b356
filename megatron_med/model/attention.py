"""Causal self-attention with grouped queries, heads cut over tensor-parallel ranks."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from megatron_med.config import ModelConfig
from megatron_med.kernels import functional as kernels
from megatron_med.model.batch import MicroBatch
from megatron_med.model.cache import AttentionCache
from megatron_med.model.recompute import KEEP_ALL, Recompute, recomputed
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import RowBlocks
from megatron_med.parallel.random import DropoutRegion
from megatron_med.parallel.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


def qkv_parts(config: ModelConfig) -> dict[str, RowBlocks]:
    """Rows of q, k and v in the joint weight.

    Rows are ordered ``(group, {query heads of the group..., key, value}, head_dim)``, so that any
    tensor-parallel cut takes whole groups.
    """
    queries, width = config.queries_per_group * config.head_dim, config.head_dim
    stride = queries + 2 * width
    return {
        "q": RowBlocks(0, queries, stride),
        "k": RowBlocks(queries, width, stride),
        "v": RowBlocks(queries + width, width, stride),
    }


class Attention(nn.Module):
    """``[seq(/tp), batch, hidden]`` -> the same shape (Vaswani et al. 2017; groups: Ainslie et al. 2023)."""

    def __init__(
        self,
        layer: int,
        config: ModelConfig,
        context: ParallelContext,
        dtype: torch.dtype,
        recompute: Recompute = KEEP_ALL,
        *,
        bias: bool,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.layer = layer
        self.queries = config.queries_per_group
        self.head_dim = config.head_dim
        heads = config.num_attention_heads * config.head_dim
        rows = config.num_query_groups * (config.queries_per_group + 2) * config.head_dim
        self.qkv = ColumnParallelLinear(
            (rows, config.hidden_size),
            context,
            dtype,
            bias=bias,
            init_std=config.init_std,
            parts=qkv_parts(config),
        )
        self.output = RowParallelLinear(
            (config.hidden_size, heads),
            context,
            dtype,
            bias=bias,
            init_std=config.init_std / math.sqrt(2 * config.num_layers),
        )
        self.dropout = DropoutRegion(
            config.attention_dropout, f"layers.{layer}.attention.probabilities", context.tp.rank
        )

    def forward(
        self,
        x: Tensor,
        batch: MicroBatch,
        cache: AttentionCache | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """
        Args:
            x: ``[seq(/tp), batch, hidden]``.
            batch: the micro-batch.
            cache: attends in the place of this module, over earlier tokens, too.
            rotary: cos and sin, ``[seq, batch, 1, head_dim]``.
        """
        mixed = self.qkv(x, batch.dropout_key)  # [seq, batch, groups/tp * (queries + 2) * head_dim]
        seq, samples = mixed.shape[:2]
        mixed = mixed.view(seq, samples, -1, self.queries + 2, self.head_dim)
        query, key, value = kernels.split_qkv(mixed, self.queries, rotary)
        if cache is not None:
            return self.output(cache.attend(self.layer, query, key, value))
        return self.output(self._core(query, key, value, batch), batch.dropout_key)

    def _core(self, query: Tensor, key: Tensor, value: Tensor, batch: MicroBatch) -> Tensor:
        """``[seq, batch, heads, head_dim]`` and keys and values of the groups -> ``[seq, batch, heads * head_dim]``."""
        probability = self.dropout.probability if self.training else 0.0
        core = partial(
            kernels.attention,
            causal=True,
            documents=batch.documents,
            dropout=probability,
            seed=self.dropout.seed(batch.dropout_key) if probability else None,
        )
        again = self.training and self.recompute.attention_core
        if again and not kernels.attention_is_fused(query, key, value, dropout=probability):
            return recomputed(core, query, key, value)
        return core(query, key, value)
