"""What both families share: one chunk of a pipeline stage, of embedding, layers, final norm and head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_med.config import ModelConfig
from megatron_med.config.layers import Chunk
from megatron_med.config.schema import LANGUAGE_MODEL
from megatron_med.model.batch import MicroBatch
from megatron_med.model.cache import AttentionCache
from megatron_med.model.quantize import FinishLayer, keep_dense
from megatron_med.model.recompute import KEEP_ALL, Recompute, recomputed
from megatron_med.model.score import ScoreHead
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import name_parameters
from megatron_med.parallel.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_med.parallel.tensor_parallel.layers import VocabParallelEmbedding, VocabParallelHead

ReadOut = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
"""Takes ``Transformer.logits`` and the last hidden states."""


class Embedding(nn.Module):
    """Of words and, in some families, of positions."""

    def __init__(self, word: VocabParallelEmbedding, position: nn.Module | None = None) -> None:
        super().__init__()
        self.word = word
        self.position = position


class Transformer(nn.Module, ABC):
    """One chunk of a decoder. Families fill in ``make_layer``, ``make_norm``, ``embed`` and ``layer_inputs``.

    Args:
        config: the whole model.
        context: the grid.
        chunk: this chunk's layers, and whether it begins and ends the model.
        dtype: of weights and activations.
        recompute: which activations are computed again in the backward pass.
        finish_layer: what is done to each layer as soon as it is made.

    Attributes:
        embedding: on the first chunk, and on the last one where it is tied to the head.
        layers, final_norm, head: the last two on the last chunk.
        score: in place of the head, where the model scores sequences.
    """

    embedding: Embedding

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext,
        chunk: Chunk,
        dtype: torch.dtype,
        recompute: Recompute = KEEP_ALL,
        finish_layer: FinishLayer = keep_dense,
    ) -> None:
        super().__init__()
        self.config = config
        self.context = context
        self.chunk = chunk
        self.dtype = dtype
        self.recompute = recompute
        tied = bool(config.tie_embeddings)
        if chunk.is_first or (tied and chunk.is_last):
            self.embedding = self.make_embedding(dtype)
        self.layers = nn.ModuleList()
        for index in chunk.layers:
            self.layers.append(self.make_layer(index, dtype))
            finish_layer(self.layers[-1], index)
        if chunk.is_last:
            self.final_norm = self.make_norm(dtype)
        if chunk.is_last and config.head != LANGUAGE_MODEL:
            self.score = ScoreHead(config, context, dtype)
        elif chunk.is_last:
            self.head = VocabParallelHead(
                (config.padded_vocab_size, config.hidden_size),
                context,
                dtype,
                bias=False,
                init_std=config.init_std,
                weight=self.embedding.word.weight if tied else None,
            )
        name_parameters(self, chunk.layers)

    def make_embedding(self, dtype: torch.dtype) -> Embedding:
        """Word embeddings on the chunks that hold it: the first one, and the last one where it is tied to the head."""
        config, chunk = self.config, self.chunk
        tied = bool(config.tie_embeddings)
        return Embedding(
            VocabParallelEmbedding(
                (config.padded_vocab_size, config.hidden_size),
                self.context,
                dtype,
                init_std=config.init_std,
                shared=tied and self.context.pp.size > 1,
                grad_contributions=2 if tied and chunk.is_first and chunk.is_last else 1,
            )
        )

    @abstractmethod
    def make_layer(self, layer: int, dtype: torch.dtype) -> nn.Module:
        """The transformer layer with this global index."""

    @abstractmethod
    def make_norm(self, dtype: torch.dtype) -> nn.Module:
        """The family's normalisation."""

    @abstractmethod
    def embed(self, batch: MicroBatch) -> Tensor:
        """Token ids -> ``[seq(/tp), batch, hidden]``."""

    def layer_inputs(self, batch: MicroBatch) -> tuple[Any, ...]:
        """What every layer gets besides hidden states, micro-batch and cache."""
        return ()

    def forward(
        self,
        hidden: Tensor | None,
        batch: MicroBatch,
        cache: AttentionCache | None = None,
        read_out: ReadOut | None = None,
    ) -> Tensor:
        """
        Args:
            hidden: the previous chunk's hidden states, ``[seq(/tp), batch, hidden]``; None on the first one.
            batch: the micro-batch; every stage reads positions itself.
            cache: attends over earlier tokens, where the model is read from.
            read_out: what the last chunk gives in place of the logits of every token.

        Returns:
            Hidden states; on the last chunk logits, ``[seq, batch, padded_vocab/tp]`` or ``[seq, batch, labels]``, or
            what ``read_out`` makes.
        """
        if self.chunk.is_first:
            hidden = self.embed(batch)
        assert hidden is not None, "a chunk after the first one needs hidden states"
        inputs = self.layer_inputs(batch)
        for index, layer in zip(self.chunk.layers, self.layers, strict=True):
            if self.training and self.recompute.whole_layer(index):
                hidden = recomputed(layer, hidden, batch, cache, *inputs)
            else:
                hidden = layer(hidden, batch, cache, *inputs)
        if not self.chunk.is_last:
            return hidden
        return self.logits(hidden) if read_out is None else read_out(self.logits, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states ``[seq(/tp), batch, hidden]`` -> ``[seq, batch, padded_vocab/tp]``, or of labels."""
        hidden = self.final_norm(hidden)
        return self.head(hidden) if self.config.head == LANGUAGE_MODEL else self.score(hidden)

    def read_loss(self, batch: MicroBatch, scale: Tensor | None) -> ReadOut:
        """What makes ``forward`` give the loss of a micro-batch, as ``loss`` is of logits.

        Args:
            batch: the micro-batch.
            scale: the gradient that the loss will get; None: no backward pass follows.
        """

        def read(logits: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            if self.config.head != LANGUAGE_MODEL or not self.head.can_give_loss:
                return self.loss(logits(hidden), batch)
            hidden = self.final_norm(hidden)
            return self.head.loss(hidden, batch.labels.t(), batch.loss_mask.t(), self.config.vocab_size, scale)

        return read

    def loss(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        """Sum over the micro-batch of masked losses, fp32. Divide by the batch's count of what is masked in."""
        if self.config.head != LANGUAGE_MODEL:
            return self.score.loss(logits, batch)
        losses = vocab_parallel_cross_entropy(logits, batch.labels.t(), self.config.vocab_size, self.context.tp)
        return (losses * batch.loss_mask.t()).sum()

    def hidden_shape(self, batch: MicroBatch) -> tuple[int, ...]:
        """Shape of the hidden states between chunks."""
        samples, length = batch.tokens.shape
        return (length // self.context.sequence_shards, samples, self.config.hidden_size)
