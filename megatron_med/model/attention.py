"""Causal self-attention with grouped queries, heads cut over tensor-parallel ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron_med.config import ModelConfig
from megatron_med.kernels import functional as kernels
from megatron_med.model.cache import KeyValueCache
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_med.parallel.random import DropoutRegion


def qkv_parts(config: ModelConfig) -> dict[str, Tensor]:
    """Rows of q, k and v in the joint weight.

    Rows are ordered ``(group, {query heads of the group..., key, value}, head_dim)``, so that any
    tensor-parallel cut takes whole groups.
    """
    groups, queries, width = config.num_query_groups, config.queries_per_group, config.head_dim
    rows = torch.arange(groups * (queries + 2) * width).view(groups, queries + 2, width)
    return {
        "q": rows[:, :queries].flatten(),
        "k": rows[:, queries].flatten(),
        "v": rows[:, queries + 1].flatten(),
    }


class Attention(nn.Module):
    """``[seq(/tp), batch, hidden]`` -> the same shape (Vaswani et al. 2017; groups: Ainslie et al. 2023)."""

    def __init__(
        self, layer: int, config: ModelConfig, context: ParallelContext, dtype: torch.dtype, *, bias: bool
    ) -> None:
        super().__init__()
        self.layer = layer
        self.queries = config.queries_per_group
        self.head_dim = config.head_dim
        name = f"layers.{layer}.attention"
        heads = config.num_attention_heads * config.head_dim
        rows = config.num_query_groups * (config.queries_per_group + 2) * config.head_dim
        self.qkv = ColumnParallelLinear(
            f"{name}.qkv",
            (rows, config.hidden_size),
            context,
            dtype,
            bias=bias,
            init_std=config.init_std,
            parts=qkv_parts(config),
        )
        self.output = RowParallelLinear(
            f"{name}.output",
            (config.hidden_size, heads),
            context,
            dtype,
            bias=bias,
            init_std=config.init_std / math.sqrt(2 * config.num_layers),
        )
        self.dropout = DropoutRegion(config.attention_dropout, f"{name}.probabilities", context.tp.rank)

    def forward(
        self,
        x: Tensor,
        dropout_key: str,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """
        Args:
            x: ``[seq(/tp), batch, hidden]``.
            dropout_key: names the micro-batch.
            rotary: cos and sin, ``[seq, batch, 1, head_dim]``.
            cache: keys and values of earlier tokens; the new ones are added.
        """
        mixed = self.qkv(x)  # [seq, batch, groups/tp * (queries + 2) * head_dim]
        seq, batch = mixed.shape[:2]
        mixed = mixed.view(seq, batch, -1, self.queries + 2, self.head_dim)
        query = mixed[..., : self.queries, :].reshape(seq, batch, -1, self.head_dim)
        key, value = mixed[..., self.queries, :], mixed[..., self.queries + 1, :]
        if rotary is not None:
            query, key = kernels.rotate(query, *rotary), kernels.rotate(key, *rotary)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
            assert seq in (1, key.shape[0]), "after the prompt, tokens come one at a time"
        probability = self.dropout.probability if self.training else 0.0
        out = kernels.attention(
            query,
            key,
            value,
            causal=seq > 1,
            dropout=probability,
            seed=self.dropout.seed(dropout_key) if probability else None,
        )
        return self.output(out)
