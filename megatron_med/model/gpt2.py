"""GPT-2 (Radford et al. 2019): LayerNorm before each part, learned positions, GELU, biases, tied head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_med.config import ModelConfig
from megatron_med.config.layers import Chunk
from megatron_med.model.attention import Attention
from megatron_med.model.batch import MicroBatch
from megatron_med.model.cache import AttentionCache
from megatron_med.model.mlp import MLP
from megatron_med.model.norm import LayerNorm
from megatron_med.model.quantize import FinishLayer, keep_dense
from megatron_med.model.recompute import KEEP_ALL, Recompute
from megatron_med.model.transformer import Embedding, Transformer
from megatron_med.parallel.collectives import split_first_dim
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import ParameterLayout, make_parameter
from megatron_med.parallel.random import DropoutRegion


def _sequence_shard(context: ParallelContext) -> int:
    """Coordinate of this rank's shard of a residual stream; 0 where every rank holds all of it."""
    return context.tp.rank if context.sequence_parallel else 0


class PositionEmbedding(nn.Module):
    """Positions ``[batch, seq]`` -> ``[seq(/tp), batch, hidden]``; every tensor-parallel rank holds all of them."""

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.context = context
        layout = ParameterLayout(
            (config.max_position_embeddings, config.hidden_size),
            partial_over_tp=context.sequence_parallel,
            init_std=config.init_std,
        )
        self.weight = make_parameter(layout, context, dtype)

    def forward(self, positions: Tensor) -> Tensor:
        positions = positions.t()
        if self.context.sequence_parallel:
            positions = split_first_dim(positions, self.context.tp)
        return F.embedding(positions, self.weight)


class GPT2Layer(nn.Module):
    """x + dropout(attention(norm(x))), then x + dropout(mlp(norm(x)))."""

    def __init__(
        self, layer: int, config: ModelConfig, context: ParallelContext, dtype: torch.dtype, recompute: Recompute
    ) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config, context, dtype)
        self.attention = Attention(layer, config, context, dtype, recompute, bias=True)
        self.mlp_norm = LayerNorm(config, context, dtype)
        self.mlp = MLP(config, context, dtype)
        shard = _sequence_shard(context)
        self.attention_dropout = DropoutRegion(config.hidden_dropout, f"layers.{layer}.attention", shard)
        self.mlp_dropout = DropoutRegion(config.hidden_dropout, f"layers.{layer}.mlp", shard)

    def forward(self, x: Tensor, batch: MicroBatch, cache: AttentionCache | None) -> Tensor:
        key = batch.dropout_key
        attended = self.attention(self.attention_norm(x), batch, cache)
        x = x + self.attention_dropout(attended, key, self.training)
        return x + self.mlp_dropout(self.mlp(self.mlp_norm(x), key), key, self.training)


class GPT2(Transformer):
    """One chunk of a GPT-2 model."""

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
        self.embedding_dropout = DropoutRegion(config.embedding_dropout, "embedding", _sequence_shard(context))

    def make_embedding(self, dtype: torch.dtype) -> Embedding:
        word = super().make_embedding(dtype).word
        return Embedding(word, PositionEmbedding(self.config, self.context, dtype) if self.chunk.is_first else None)

    def make_layer(self, layer: int, dtype: torch.dtype) -> nn.Module:
        return GPT2Layer(layer, self.config, self.context, dtype, self.recompute)

    def make_norm(self, dtype: torch.dtype) -> nn.Module:
        return LayerNorm(self.config, self.context, dtype)

    def embed(self, batch: MicroBatch) -> Tensor:
        assert self.embedding.position is not None, "only the first chunk embeds"
        hidden = self.embedding.word(batch.tokens) + self.embedding.position(batch.positions)
        return self.embedding_dropout(hidden, batch.dropout_key, self.training)
