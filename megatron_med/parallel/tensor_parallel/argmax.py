"""The most likely token over a vocabulary that is cut over tensor-parallel ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_med.parallel.collectives import all_gather_first_dim
from megatron_med.parallel.context import Axis

NOT_FINITE = -1
"""In place of an id where a row holds NaN or infinity."""


def vocab_parallel_argmax(logits: Tensor, vocab_size: int, tp: Axis) -> Tensor:
    """Ids of the highest logits, the first of equal ones; logits are never gathered.

    Args:
        logits: ``[rows, padded_vocab/tp]``, this rank's columns; at least one is in the vocabulary.
        vocab_size: true size; the padded columns after it are not looked at.
        tp: the tensor-parallel axis.

    Returns:
        ``[rows]`` int64, equal on every tensor-parallel rank; NOT_FINITE where a logit is NaN or infinite.
    """
    width = logits.shape[-1]
    first = tp.rank * width
    own = max(0, min(width, vocab_size - first))
    if own:
        columns = logits[:, :own].float()
        value, local = columns.max(dim=-1)
        broken = ~columns.sum(dim=-1).isfinite()  # one pass: NaN and infinity stay in a sum
        value = value.masked_fill(broken, math.inf)  # wins everywhere
        ids = (local + first).masked_fill(broken, NOT_FINITE)
    else:
        value = logits.new_full((len(logits),), -math.inf, dtype=torch.float32)
        ids = torch.zeros_like(value, dtype=torch.int64)
    if tp.group is None:
        return ids
    both = torch.stack((value.double(), ids.double()), dim=-1)  # ids are exact in double precision
    candidates = all_gather_first_dim(both.unsqueeze(0), tp)  # [tp, rows, 2], ids rise with the rank
    best = candidates[..., 0].argmax(dim=0, keepdim=True)
    return candidates[..., 1].gather(0, best).squeeze(0).long()
