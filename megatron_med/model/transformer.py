"""What both families share: one pipeline stage of embedding, layers, final norm and head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_med.config import ModelConfig
from megatron_med.kernels import functional as kernels
from megatron_med.model.batch import MicroBatch
from megatron_med.model.cache import KeyValueCache
from megatron_med.parallel.collectives import enter_tensor_parallel
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_med.parallel.layers import ColumnParallelLinear, VocabParallelEmbedding


class Transformer(nn.Module, ABC):
    """One stage of a decoder. Families fill in ``make_layer``, ``make_norm``, ``embed`` and ``run_layers``.

    Args:
        config: the whole model.
        context: the grid; says whether this is the first or last stage.
        layers: global indices of this stage's layers.
        dtype: of weights and activations.
    """

    def __init__(
        self, config: ModelConfig, context: ParallelContext, layers: Sequence[int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = config
        self.context = context
        self.dtype = dtype
        self.word_embedding: VocabParallelEmbedding | None = None
        self.head: ColumnParallelLinear | None = None
        tied = bool(config.tie_embeddings)
        shape = (config.padded_vocab_size, config.hidden_size)
        if context.is_first_stage or (tied and context.is_last_stage):
            self.word_embedding = VocabParallelEmbedding(
                "embedding.word", shape, context, dtype, init_std=config.init_std, shared=tied and context.pp.size > 1
            )
        self.layers = nn.ModuleList(self.make_layer(layer, dtype) for layer in layers)
        if context.is_last_stage:
            self.final_norm = self.make_norm("final_norm", dtype)
            if not tied:
                self.head = ColumnParallelLinear("head", shape, context, dtype, bias=False, init_std=config.init_std)

    @abstractmethod
    def make_layer(self, layer: int, dtype: torch.dtype) -> nn.Module:
        """The transformer layer with this global index."""

    @abstractmethod
    def make_norm(self, name: str, dtype: torch.dtype) -> nn.Module:
        """The family's normalisation."""

    @abstractmethod
    def embed(self, batch: MicroBatch) -> Tensor:
        """Token ids -> ``[seq(/tp), batch, hidden]``."""

    @abstractmethod
    def run_layers(self, hidden: Tensor, batch: MicroBatch, cache: KeyValueCache | None) -> Tensor:
        """Through this stage's layers."""

    def forward(self, hidden: Tensor | None, batch: MicroBatch, cache: KeyValueCache | None = None) -> Tensor:
        """
        Args:
            hidden: the previous stage's hidden states, ``[seq(/tp), batch, hidden]``; None on the first stage.
            batch: the micro-batch; every stage reads positions itself.
            cache: earlier keys and values, when generating.

        Returns:
            Hidden states; on the last stage logits, ``[seq, batch, padded_vocab/tp]``.
        """
        if self.context.is_first_stage:
            hidden = self.embed(batch)
        assert hidden is not None, "a stage behind the first one needs hidden states"
        hidden = self.run_layers(hidden, batch, cache)
        if not self.context.is_last_stage:
            return hidden
        return self.logits(self.final_norm(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """``[seq(/tp), batch, hidden]`` -> ``[seq, batch, padded_vocab/tp]``."""
        if self.head is not None:
            return self.head(hidden)
        assert self.word_embedding is not None, "a tied head needs the embedding on the last stage"
        whole = enter_tensor_parallel(hidden, self.context.tp, self.context.sequence_parallel)
        return kernels.linear(whole, self.word_embedding.weight)

    def loss(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        """Sum over the micro-batch of masked token losses, fp32. Divide by the batch's count of tokens."""
        losses = vocab_parallel_cross_entropy(logits, batch.labels.t(), self.config.vocab_size, self.context.tp)
        return (losses * batch.loss_mask.t()).sum()

    def hidden_shape(self, batch: MicroBatch) -> tuple[int, ...]:
        """Shape of the hidden states between stages."""
        samples, length = batch.tokens.shape
        return (length // self.context.sequence_shards, samples, self.config.hidden_size)
