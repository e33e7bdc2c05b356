"""Llama (Touvron et al. 2023): RMSNorm before each part, rotary positions, SwiGLU, grouped queries, no biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_med.config import ModelConfig
from megatron_med.config.layers import Chunk
from megatron_med.model.attention import Attention
from megatron_med.model.batch import MicroBatch
from megatron_med.model.cache import AttentionCache
from megatron_med.model.mlp import GatedMLP
from megatron_med.model.norm import RMSNorm
from megatron_med.model.quantize import FinishLayer, keep_dense
from megatron_med.model.recompute import KEEP_ALL, Recompute
from megatron_med.model.rope import RotaryEmbedding
from megatron_med.model.transformer import Transformer
from megatron_med.parallel.context import ParallelContext


class LlamaLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, layer: int, config: ModelConfig, context: ParallelContext, dtype: torch.dtype, recompute: Recompute
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config, context, dtype)
        self.attention = Attention(layer, config, context, dtype, recompute, bias=False)
        self.mlp_norm = RMSNorm(config, context, dtype)
        self.mlp = GatedMLP(config, context, dtype)

    def forward(
        self, x: Tensor, batch: MicroBatch, cache: AttentionCache | None, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), batch, cache, rotary)
        return x + self.mlp(self.mlp_norm(x), batch.dropout_key)


class Llama(Transformer):
    """One chunk of a Llama model."""

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext,
        chunk: Chunk,
        dtype: torch.dtype,
        recompute: Recompute = KEEP_ALL,
        finish_layer: FinishLayer = keep_dense,
    ) -> None:
        super().__init__(config, context, chunk, dtype, recompute, finish_layer)
        self.rotary = RotaryEmbedding(config, context.device, dtype)

    def make_layer(self, layer: int, dtype: torch.dtype) -> nn.Module:
        return LlamaLayer(layer, self.config, self.context, dtype, self.recompute)

    def make_norm(self, dtype: torch.dtype) -> nn.Module:
        return RMSNorm(self.config, self.context, dtype)

    def embed(self, batch: MicroBatch) -> Tensor:
        return self.embedding.word(batch.tokens)

    def layer_inputs(self, batch: MicroBatch) -> tuple[Any, ...]:
        return (self.rotary(batch.positions),)
