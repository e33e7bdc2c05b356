"""What every pipeline stage knows of a micro-batch without being told by another stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_med.kernels.functional import PackedDocuments


@dataclass(frozen=True)
class MicroBatch:
    """Some samples on their way through the model.

    Attributes:
        tokens: ``[batch, seq]`` int64.
        labels: ``[batch, seq]`` int64, the next token at each place.
        loss_mask: ``[batch, seq]`` fp32, 1 where the loss counts.
        positions: ``[batch, seq]`` int64; they restart with each document where documents are kept apart.
        dropout_key: names this micro-batch for the dropout masks: seed, step and global index.
        documents: borders of the documents that do not see each other; None: each row is one.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    dropout_key: str = ""
    documents: PackedDocuments | None = None


def plain_batch(tokens: Tensor, labels: Tensor | None = None, dropout_key: str = "") -> MicroBatch:
    """Rows of one document each, every label counting.

    Args:
        tokens: ``[batch, seq]``.
        labels: of the same shape; None where nobody asks for the loss.
        dropout_key: names the dropout masks.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return batch_to_read(tokens, positions, labels, dropout_key)


def batch_to_read(tokens: Tensor, positions: Tensor, labels: Tensor | None = None, dropout_key: str = "") -> MicroBatch:
    """Tokens at given positions, every label counting; both ``[batch, seq]``."""
    mask = torch.ones_like(tokens, dtype=torch.float32)
    return MicroBatch(tokens, tokens if labels is None else labels, mask, positions, dropout_key)
