"""Trained rows of a frozen vocabulary: what is added to those of some tokens, in the embedding and in the head.

Every tensor-parallel rank holds the few rows whole. The head's part of the logits is one column a token, so what
travels is narrow.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_med.parallel.collectives import copy_to_tensor_parallel, split_first_dim
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import RowBlocks
from megatron_med.parallel.tensor_parallel.lora import AddToBlocks


class NewRows(nn.Module):
    """Differences ``weight [rows, hidden]`` to the frozen rows of the tokens ``tokens``."""

    def __init__(self, tokens: range, weight: nn.Parameter, context: ParallelContext) -> None:
        super().__init__()
        self.tokens = tokens
        self.weight = weight
        self.context = context


class EmbeddingRows(NewRows):
    """Adds to what the embedding has looked up."""

    def forward(self, tokens: Tensor, out: Tensor) -> Tensor:
        """
        Args:
            tokens: ``[seq, batch]``.
            out: ``[seq(/tp), batch, hidden]``.
        """
        if self.context.sequence_parallel:
            tokens = split_first_dim(tokens, self.context.tp)
        rows = tokens - self.tokens.start
        others = (rows < 0) | (rows >= len(self.tokens))
        added = F.embedding(rows.masked_fill(others, 0), self.weight)
        return out + added.masked_fill(others.unsqueeze(-1), 0)


class HeadRows(NewRows):
    """Adds to the logits."""

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """
        Args:
            x: input of the head, ``[seq(/tp), batch, hidden]``.
            out: its product with the frozen rows of this rank, ``[seq, batch, vocabulary/tp]``, changed in place.
        """
        tp = self.context.tp
        logits = copy_to_tensor_parallel(F.linear(x, self.weight), tp, self.context.sequence_parallel)
        columns = out.shape[-1]
        here = range(tp.rank * columns, (tp.rank + 1) * columns)
        first, last = max(here.start, self.tokens.start), min(here.stop, self.tokens.stop)
        count = max(0, last - first)  # 0: this rank has none of them, but takes part in the sum of the gradients
        place = RowBlocks(first - here.start if count else 0, count, columns)
        own = logits.narrow(-1, first - self.tokens.start if count else 0, count)
        return AddToBlocks.apply(out, [place], own)
