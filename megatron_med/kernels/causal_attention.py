"""Attention of training by the kernels of ``csrc/kernels``: causal, over rows of the batch or over their documents.

No scores are stored (Dao et al. 2022); kept are queries, keys, values, the output and a number a query. Nothing is
copied: the tensors lie as the layer's products want them. In bf16 plain torch serves, which has the processor's bf16
products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_med.kernels.functional import PackedDocuments
from megatron_med.kernels.native import OPERATIONS, KernelFunction
from megatron_med.kernels.opaque import NAMESPACE, Cost, declare_cost


def takes(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, dropout: float = 0.0, **_: Any) -> bool:
    """Whether the kernel serves: fp32 tokens that all see those before them, without dropout."""
    whole = causal and query.shape[0] == key.shape[0]
    return whole and not dropout and query.dtype == key.dtype == value.dtype == torch.float32


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, documents: PackedDocuments | None = None, **_: Any
) -> Tensor:
    """See ``functional.attention``."""
    borders = None if documents is None else documents.cu_seqlens
    return _CausalAttention.call(query.contiguous(), key.contiguous(), value.contiguous(), borders).flatten(2)


class _CausalAttention(KernelFunction):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, borders: Tensor | None) -> Tensor:
        out, logsumexp = OPERATIONS.causal_attention_forward(query, key, value, borders)
        ctx.save_for_backward(query, key, value, out, logsumexp, borders)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = OPERATIONS.causal_attention_backward(gradients[0].contiguous(), *ctx.saved_tensors)
        return query, key, value, None


@torch.library.register_fake(f"{NAMESPACE}::causal_attention_forward")
def _(query: Tensor, key: Tensor, value: Tensor, borders: Tensor | None) -> tuple[Tensor, Tensor]:
    seq, batch, heads, _ = query.shape
    return torch.empty_like(query), query.new_empty(batch, heads, seq)


@torch.library.register_fake(f"{NAMESPACE}::causal_attention_backward")
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


QUERIES_OF_A_BLOCK, KEYS_OF_A_BLOCK = 96, 192
"""See ``tiles.h``."""


def _cost(query: Tensor, key: Tensor, borders: Tensor | None, backward: bool) -> Cost:
    """Of documents it is taken that they are of one length; of threads, that there is one."""
    seq, batch, heads, width = query.shape
    documents = batch if borders is None else max(1, borders.numel() - 1)
    pairs = (seq * batch) ** 2 / documents / 2
    moved = 4 * (2 * query.numel() + 2 * key.numel() + seq * batch * heads)
    products = 2 if not backward else 5
    flops = 2.0 * products * pairs * heads * width
    if backward:
        floats = 5 * KEYS_OF_A_BLOCK * width + QUERIES_OF_A_BLOCK * (3 * width + 2 * KEYS_OF_A_BLOCK) + seq
        return Cost(flops, 2 * moved, 4 * floats, "attention_backward", (heads * batch, seq, seq, width))
    floats = 2 * seq * width + QUERIES_OF_A_BLOCK * (2 * width + KEYS_OF_A_BLOCK)
    return Cost(flops, moved, 4 * floats, "attention_forward", (heads * batch, seq, seq, width))


declare_cost("causal_attention_forward", lambda query, key, value, borders: _cost(query, key, borders, False))
declare_cost(
    "causal_attention_backward",
    lambda grad, query, key, value, out, logsumexp, borders: _cost(query, key, borders, True),
)
