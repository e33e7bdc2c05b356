"""The operations of the models on local tensors. What stands here is the reference, in plain torch; ``backend.py``
chooses what serves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend

from megatron_med.kernels.backend import operation


@operation
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019), in fp32 for half precisions."""
    if x.dtype == torch.float32:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    x_fp32 = x.float()
    normed = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


@operation
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / std * weight + bias over the last dimension (Ba et al. 2016)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


@operation
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020); ``[..., 2 * n]``, gate first, -> ``[..., n]``."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(Function):
    """Forward: silu(gate) * up. Backward: both gradients written side by side, without joining them afterwards."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        joint = torch.empty_like(gate_up)
        grad_gate, grad_up = joint.chunk(2, dim=-1)
        torch.mul(gradients[0], F.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(gradients[0] * up, gate))
        return joint


@operation
def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, as GPT-2 has it."""
    return F.gelu(x, approximate="tanh")


@operation
def split_qkv(mixed: Tensor, queries: int, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the joint product of an attention layer apart, and turns queries and keys to their positions.

    Args:
        mixed: ``[seq, batch, groups, queries + 2, head_dim]``: the queries of a group, its key, its value.
        queries: of a group.
        rotary: cos and sin, see ``apply_rotary_emb``; None: positions are told otherwise.

    Returns:
        Query ``[seq, batch, groups * queries, head_dim]``, key and value ``[seq, batch, groups, head_dim]``.
    """
    query, key, value = mixed[..., :queries, :].flatten(2, 3), mixed[..., queries, :], mixed[..., queries + 1, :]
    if rotary is not None:
        query, key = apply_rotary_emb(query, *rotary), apply_rotary_emb(key, *rotary)
    return query, key, value


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) on halves: number i turns with number i + head_dim / 2.

    Args:
        x: ``[seq, batch, heads, head_dim]``.
        cos, sin: ``[seq, batch, 1, head_dim]``, the angles of the first half repeated for the second.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@dataclass(frozen=True)
class PackedDocuments:
    """Documents that do not see each other, row after row of a batch.

    Attributes:
        lengths: tokens of each; they add up to batch x seq.
        cu_seqlens: ``[documents + 1]`` int32, their cumulative sum from 0, on the device.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> PackedDocuments:
        """From the lengths alone."""
        borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return cls(tuple(lengths), borders.to(device))


@operation
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    documents: PackedDocuments | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, over each row of the batch or over each of its documents.

    Args:
        query: ``[seq, batch, heads, head_dim]``.
        key, value: ``[keys, batch, groups, head_dim]``; each group serves heads / groups query heads.
        causal: a query sees keys up to its own position; False: all of them.
        documents: a query sees keys of its own document only; then ``causal`` holds.
        dropout: probability of dropping an attention weight.
        seed: seeds the mask. The operation has no generator argument, so the device's own is seeded; nothing
            else draws from that one.

    Returns:
        ``[seq, batch, heads * head_dim]``.
    """
    if dropout and seed is not None:
        torch.manual_seed(seed)
    if documents is None:
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [batch, heads, seq, head_dim]
        return _scaled_dot_product(q, k, v, causal, dropout).permute(2, 0, 1, 3).flatten(2)
    assert causal, "documents are kept apart in training only"
    seq, batch = query.shape[:2]
    q, k, v = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))  # [batch * seq, heads, head_dim]
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        out = _varlen(q, k, v, documents)
    else:
        out = _document_by_document(q, k, v, documents, dropout)
    return out.view(batch, seq, -1).transpose(0, 1)


def _varlen(query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments) -> Tensor:
    """One FlashAttention call over all documents; the window (-1, 0) is causal."""
    from torch.nn.attention.varlen import varlen_attn  # brings torch's compiler: most of a second at every start

    longest, borders = max(documents.lengths), documents.cu_seqlens
    grouped = query.shape[1] != key.shape[1]
    out = varlen_attn(query, key, value, borders, borders, longest, longest, window_size=(-1, 0), enable_gqa=grouped)
    assert isinstance(out, Tensor), "no auxiliary outputs were asked for"
    return out


def _document_by_document(
    query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments, dropout: float
) -> Tensor:
    """One call a document. Cut by one split and joined by one cat: the backward pass of a slice would write a whole
    tensor for every document."""
    split = (tensor.split(documents.lengths) for tensor in (query, key, value))
    outs = []
    for one in zip(*split, strict=True):  # [length, heads, head_dim] each
        q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in one)
        outs.append(_scaled_dot_product(q, k, v, True, dropout).squeeze(0).transpose(0, 1))
    return torch.cat(outs)


def _scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, causal: bool, dropout: float) -> Tensor:
    """``[batch, heads, seq, head_dim]``, keys and values of the groups."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, dropout_p=dropout, enable_gqa=grouped)


def attention_is_fused(query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0) -> bool:
    """Whether causal ``attention`` runs a kernel that never stores its ``[heads, seq, keys]`` probabilities."""
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    grouped = query.shape[2] != key.shape[2]
    return torch._fused_sdp_choice(q, k, v, None, dropout, True, enable_gqa=grouped) != SDPBackend.MATH.value
