"""What both families share: one chunk of a pipeline stage, of embedding, layers, final norm and head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from megatron_med.config import ModelConfig
from megatron_med.config.layers import Chunk
from megatron_med.model.batch import MicroBatch
from megatron_med.model.cache import KeyValueCache
from megatron_med.model.recompute import KEEP_ALL, Recompute, recomputed
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_med.parallel.layers import ColumnParallelLinear, VocabParallelEmbedding


class Transformer(nn.Module, ABC):
    """One chunk of a decoder. Families fill in ``make_layer``, ``make_norm``, ``embed`` and ``layer_inputs``.

    Args:
        config: the whole model.
        context: the grid.
        chunk: this piece's layers, and whether it begins and ends the model.
        dtype: of weights and activations.
        recompute: which activations are computed again in the backward pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext,
        chunk: Chunk,
        dtype: torch.dtype,
        recompute: Recompute = KEEP_ALL,
    ) -> None:
        super().__init__()
        self.config = config
        self.context = context
        self.chunk = chunk
        self.dtype = dtype
        self.recompute = recompute
        self.word_embedding: VocabParallelEmbedding | None = None
        self.head: ColumnParallelLinear | None = None
        tied = bool(config.tie_embeddings)
        shape = (config.padded_vocab_size, config.hidden_size)
        if chunk.is_first or (tied and chunk.is_last):
            self.word_embedding = VocabParallelEmbedding(
                "embedding.word",
                shape,
                context,
                dtype,
                init_std=config.init_std,
                shared=tied and context.pp.size > 1,
                uses=2 if tied and chunk.is_first and chunk.is_last else 1,
            )
        self.layers = nn.ModuleList(self.make_layer(layer, dtype) for layer in chunk.layers)
        if chunk.is_last:
            self.final_norm = self.make_norm("final_norm", dtype)
            self.head = ColumnParallelLinear(
                "head",
                shape,
                context,
                dtype,
                bias=False,
                init_std=config.init_std,
                weight=self.word_embedding.weight if tied and self.word_embedding is not None else None,
            )

    @abstractmethod
    def make_layer(self, layer: int, dtype: torch.dtype) -> nn.Module:
        """The transformer layer with this global index."""

    @abstractmethod
    def make_norm(self, name: str, dtype: torch.dtype) -> nn.Module:
        """The family's normalisation."""

    @abstractmethod
    def embed(self, batch: MicroBatch) -> Tensor:
        """Token ids -> ``[seq(/tp), batch, hidden]``."""

    def layer_inputs(self, batch: MicroBatch) -> tuple[Any, ...]:
        """What every layer gets beside hidden states, micro-batch and cache."""
        return ()

    def forward(self, hidden: Tensor | None, batch: MicroBatch, cache: KeyValueCache | None = None) -> Tensor:
        """
        Args:
            hidden: the previous chunk's hidden states, ``[seq(/tp), batch, hidden]``; None on the first one.
            batch: the micro-batch; every stage reads positions itself.
            cache: earlier keys and values, when generating.

        Returns:
            Hidden states; on the last chunk logits, ``[seq, batch, padded_vocab/tp]``.
        """
        if self.chunk.is_first:
            hidden = self.embed(batch)
        assert hidden is not None, "a chunk behind the first one needs hidden states"
        inputs = self.layer_inputs(batch)
        for index, layer in zip(self.chunk.layers, self.layers, strict=True):
            if self.training and self.recompute.whole_layer(index):
                hidden = recomputed(layer, hidden, batch, cache, *inputs)
            else:
                hidden = layer(hidden, batch, cache, *inputs)
        if self.head is None:
            return hidden
        return self.head(self.final_norm(hidden))

    def loss(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        """Sum over the micro-batch of masked token losses, fp32. Divide by the batch's count of tokens."""
        losses = vocab_parallel_cross_entropy(logits, batch.labels.t(), self.config.vocab_size, self.context.tp)
        return (losses * batch.loss_mask.t()).sum()

    def hidden_shape(self, batch: MicroBatch) -> tuple[int, ...]:
        """Shape of the hidden states between chunks."""
        samples, length = batch.tokens.shape
        return (length // self.context.sequence_shards, samples, self.config.hidden_size)
