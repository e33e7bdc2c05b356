"""Attention of new tokens over keys and values that are kept, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], mask: Tensor | None) -> Tensor:
    """One new token a row over all tokens of the row.

    The query heads of a group take the place of the sequence, so that keys and values are read once for all of them.
    A GPU takes all rows at once; a CPU row after row, since reading what is masked costs more than the calls.

    Args:
        query: ``[rows, heads, head_dim]``.
        key, value: ``[rows, groups, keys, head_dim]``.
        lengths: keys of each row.
        mask: ``[rows, 1, 1, keys]``, false behind the end of a row; on a GPU, where the rows are not equally long.

    Returns:
        ``[rows, heads * head_dim]``.
    """
    rows, heads, head_dim = query.shape
    grouped = query.view(rows, key.shape[1], -1, head_dim).to(key.dtype)
    longest = max(lengths)
    if query.is_cuda or min(lengths) == longest:
        out = F.scaled_dot_product_attention(grouped, key[:, :, :longest], value[:, :, :longest], attn_mask=mask)
    else:
        pieces = zip(grouped.split(1), key.split(1), value.split(1), lengths, strict=True)
        out = torch.cat([F.scaled_dot_product_attention(q, k[:, :, :n], v[:, :, :n]) for q, k, v, n in pieces])
    return out.reshape(rows, heads * head_dim).to(query.dtype)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Tokens over the keys that a mask lets each of them see.

    Args:
        query: ``[new, heads, head_dim]``.
        key, value: ``[keys, groups, head_dim]``.
        mask: ``[new, keys]``, true where a token sees a key.

    Returns:
        ``[new, heads * head_dim]``.
    """
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1).flatten(1)
