"""Attention of new tokens over keys and values that are kept. What stands here is the reference, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_med.kernels.backend import NATIVE, operation, say_that_native_is_missing, serves


def cache_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What keys and values are kept in. Without a compiled kernel a CPU keeps fp32, whose attention over one new token
    is twice as fast in plain torch as that of bf16."""
    if device.type != "cpu":
        return dtype
    if not serves(NATIVE, "decode_attention", "cpu"):
        say_that_native_is_missing()
        return torch.float32
    return dtype if dtype == torch.bfloat16 else torch.float32


@operation
def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, kept: tuple[Tensor, Tensor], places: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Puts one new token a row into the cache, and lets it see all tokens of its row.

    The query heads of a group take the place of the sequence, so that keys and values are read once for all of them.
    A GPU takes all rows at once; a CPU row after row, since reading what is masked costs more than the calls.

    Args:
        query: ``[rows, heads, head_dim]``.
        key, value: ``[rows, groups, head_dim]``, of the new tokens.
        kept: keys and values, ``[rows or more, groups, capacity, head_dim]`` each.
        places: ``[rows]`` int64 on the device, tokens that each row has already.
        lengths: the same numbers.

    Returns:
        ``[rows, heads * head_dim]``.
    """
    rows, heads, head_dim = query.shape
    for tensor, new in zip(kept, (key, value), strict=True):
        tensor[torch.arange(rows, device=query.device), :, places] = new.to(tensor.dtype)
    longest = max(lengths) + 1
    keys, values = (tensor[:rows] for tensor in kept)
    grouped = query.view(rows, key.shape[1], -1, head_dim).to(keys.dtype)
    if query.is_cuda or min(lengths) + 1 == longest:
        mask = None
        if min(lengths) + 1 != longest:
            mask = (torch.arange(longest, device=query.device) <= places[:, None])[:, None, None]
        out = F.scaled_dot_product_attention(grouped, keys[:, :, :longest], values[:, :, :longest], attn_mask=mask)
    else:
        pieces = zip(grouped.split(1), keys.split(1), values.split(1), lengths, strict=True)
        out = torch.cat(
            [F.scaled_dot_product_attention(q, k[:, :, : n + 1], v[:, :, : n + 1]) for q, k, v, n in pieces]
        )
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
