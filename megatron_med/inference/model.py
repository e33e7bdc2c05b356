"""A model that is read from: prefill, decode and log-likelihoods, on every rank of a TP x PP grid.

All ranks of a grid call the same methods with the same arguments. What comes out of the last stage is None on the
others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_med.inference.cache import Decode, KeyValueCache, Prefill
from megatron_med.inference.tree import Tree, TreeAttention
from megatron_med.model.batch import MicroBatch, batch_to_read
from megatron_med.model.cache import AttentionCache
from megatron_med.model.transformer import ReadOut, Transformer
from megatron_med.parallel.collectives import Pending, gather_last_dim
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.pipeline_parallel.p2p import PipelineLink
from megatron_med.parallel.tensor_parallel.argmax import vocab_parallel_argmax
from megatron_med.parallel.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

_LOGITS_AT_ONCE = 1 << 24
"""Logits of this rank that log-likelihoods hold at a time: 64 MiB in fp32."""
_SENDS_UNDER_WAY = 4


class InferenceModel:
    """This rank's part of a model, and memory for what it has read.

    Args:
        chunks: of this rank, first to last.
        context: the grid.
        dtype: of the activations.
    """

    def __init__(self, chunks: Sequence[Transformer], context: ParallelContext, dtype: torch.dtype) -> None:
        self.chunks = list(chunks)
        self.context = context
        self.config = self.chunks[0].config
        self._dtype = dtype
        self._link = PipelineLink(context, dtype)

    def new_cache(self, rows: int, capacity: int) -> KeyValueCache:
        """Memory for ``rows`` sequences of up to ``capacity`` tokens."""
        return KeyValueCache(self.chunks, rows, capacity, self._dtype)

    def prefill(self, prompts: Sequence[Sequence[int]], cache: KeyValueCache, rows: Sequence[int]) -> Tensor | None:
        """Reads whole prompts, each into its row of the cache.

        Returns:
            Logits behind each prompt, ``[prompts, padded_vocab/tp]``.
        """
        lengths = [len(prompt) for prompt in prompts]
        batch = self._batch(prompts, [range(length) for length in lengths])
        attention = Prefill(cache, rows, lengths, batch.tokens.shape[1] - sum(lengths))
        last = torch.tensor([end - 1 for end in accumulate(lengths)], device=self.context.device)
        return self._forward(batch, attention, self._logits_of(last))

    def decode(self, tokens: Sequence[int], lengths: Sequence[int], cache: KeyValueCache) -> Tensor | None:
        """Reads one more token in each of the first rows of the cache.

        Args:
            tokens: one a row.
            lengths: tokens that each row has already.
            cache: of the rows.

        Returns:
            Logits behind each token, ``[rows, padded_vocab/tp]``.
        """
        batch = self._batch([tokens], [lengths])
        places = torch.arange(len(tokens), device=self.context.device)
        return self._forward(batch, Decode(cache, lengths), self._logits_of(places))

    def log_likelihoods(
        self, trees: Sequence[Tree], shared: KeyValueCache | None = None, shared_length: int = 0
    ) -> Tensor | None:
        """Log-probability of every token of every continuation, through the vocabulary-parallel cross entropy.

        Args:
            trees: contexts with their continuations.
            shared: row 0 holds tokens that all contexts begin with, which ``trees`` leave out.
            shared_length: how many.

        Returns:
            ``[2, tokens]`` fp64, tree by tree and continuation by continuation: log-probability, and 1 where no other
            token is more likely.
        """
        assert not self.context.sequence_parallel, "log-likelihoods are read from models that are not in training"
        batch = self._batch([tree.tokens for tree in trees], [tree.positions(shared_length) for tree in trees])
        attention = TreeAttention(trees, self.context.device, shared, shared_length)
        starts = [0, *accumulate(len(tree.tokens) for tree in trees)]
        places = [start + place for start, tree in zip(starts, trees, strict=False) for place in tree.places]
        targets = [token for tree in trees for token in tree.targets]
        return self._forward(batch, attention, self._scores_of(places, targets))

    def all_logits(self, tokens: Sequence[int]) -> Tensor | None:
        """fp32 logits behind every token of a text, ``[tokens, vocabulary]``, on every rank of the last stage."""
        assert not self.context.sequence_parallel, "logits are read from models that are not in training"
        batch = self._batch([tokens], [range(len(tokens))])
        attention = TreeAttention([Tree(tokens, [])], self.context.device)
        out = self._forward(batch, attention, lambda logits, hidden: logits(hidden).squeeze(1))
        return None if out is None else self.whole_logits(out)

    def scores_at_ends(self, sequences: Sequence[Sequence[int]]) -> Tensor | None:
        """fp32 scores of a head that scores, ``[sequences, labels]``, at the last token of each."""
        assert not self.context.sequence_parallel, "scores are read from models that are not in training"
        lengths = [len(sequence) for sequence in sequences]
        batch = self._batch(sequences, [range(length) for length in lengths])
        attention = TreeAttention([Tree(sequence, []) for sequence in sequences], self.context.device)
        ends = torch.tensor([end - 1 for end in accumulate(lengths)], device=self.context.device)
        return self._forward(batch, attention, lambda logits, hidden: logits(hidden[ends]).squeeze(1).float())

    def whole_logits(self, logits: Tensor) -> Tensor:
        """``[rows, padded_vocab/tp] -> [rows, vocabulary]`` in fp32."""
        gathered = gather_last_dim(logits, self.context.tp)[:, : self.config.vocab_size]
        return gathered.float() if gathered.dtype != torch.float32 else gathered.clone()

    def most_likely(self, logits: Tensor) -> Tensor:
        """``[rows, padded_vocab/tp] -> [rows]`` ids."""
        return vocab_parallel_argmax(logits, self.config.vocab_size, self.context.tp)

    def start_broadcast(self, chosen: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Pending:
        """What the last stage has chosen, on its way to all stages. It travels in the group of the way back, so that
        the hidden states of other rows need not wait for it."""
        axis = self.context.pp_backward
        if axis.group is None:
            assert chosen is not None, "a single stage is the last one"
            return Pending(chosen)
        if chosen is None:
            chosen = torch.empty(shape, dtype=dtype, device=self.context.device)
        work = dist.broadcast(chosen, axis.ranks[-1], group=axis.group, async_op=True)
        return Pending(chosen, work)

    @torch.no_grad()
    def _forward(self, batch: MicroBatch, attention: AttentionCache, read_out: ReadOut) -> Tensor | None:
        out = None
        for chunk in self.chunks:
            hidden = None
            if not chunk.chunk.is_first:
                hidden = self._link.receive_forward(chunk.hidden_shape(batch)).wait()
            out = chunk(hidden, batch, attention, read_out)
            if not chunk.chunk.is_last:
                self._link.send_forward(out)
                self._link.drain(_SENDS_UNDER_WAY)
                out = None
        return out

    def _batch(self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> MicroBatch:
        """All tokens one after the other, ``[1, tokens]``, filled up to what sequence parallelism can cut."""
        flat = [token for row in rows for token in row]
        places = [position for row in positions for position in row]
        padding = [0] * (-len(flat) % self.context.sequence_shards)
        pair = torch.tensor([flat + padding, places + padding], device=self.context.device)
        return batch_to_read(pair[:1], pair[1:])

    def _logits_of(self, places: Tensor) -> ReadOut:
        def read(logits: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            if self.context.sequence_parallel:  # this rank has a part of the tokens only
                return logits(hidden).squeeze(1)[places]
            return logits(hidden[places]).squeeze(1)

        return read

    def _scores_of(self, places: Sequence[int], targets: Sequence[int]) -> ReadOut:
        tp, vocabulary = self.context.tp, self.config.vocab_size
        rows = max(1, _LOGITS_AT_ONCE * tp.size // self.config.padded_vocab_size)

        def read(logits: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            scores = []
            for some, wanted in self._pieces(places, targets, rows):
                z = logits(hidden[some]).squeeze(1)
                loss = vocab_parallel_cross_entropy(z, wanted, vocabulary, tp)
                scores.append(torch.stack((-loss.double(), (self.most_likely(z) == wanted).double())))
            return torch.cat(scores, dim=1)

        return read

    def _pieces(self, places: Sequence[int], targets: Sequence[int], rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        pair = torch.tensor([places, targets], device=self.context.device)
        return zip(pair[0].split(rows), pair[1].split(rows), strict=True)
