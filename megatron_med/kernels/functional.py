"""The operations of the models on local tensors, each a plain-torch implementation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019), in fp32 for half precisions."""
    if x.dtype == torch.float32:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / std * weight + bias over the last dimension (Ba et al. 2016)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


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


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, as GPT-2 has it."""
    return F.gelu(x, approximate="tanh")


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) on halves: number i turns with number i + head_dim / 2.

    Args:
        x: ``[seq, batch, heads, head_dim]``.
        cos, sin: ``[seq, batch, 1, head_dim]``, the angles of the first half repeated for the second.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    allowed: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v through ``scaled_dot_product_attention``.

    Args:
        query: ``[seq, batch, heads, head_dim]``.
        key, value: ``[keys, batch, groups, head_dim]``; each group serves heads / groups query heads.
        causal: a query sees keys up to its own position; False: all of them.
        allowed: ``[batch, 1, seq, keys]`` bool, the keys that each query sees; it replaces ``causal``.
        dropout: probability of dropping an attention weight.
        seed: seeds the mask. The operation has no generator argument, so the device's own is seeded; nothing
            else draws from that one.

    Returns:
        ``[seq, batch, heads * head_dim]``.
    """
    q, k, v = _heads_first(query, key, value)
    if dropout and seed is not None:
        torch.manual_seed(seed)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=allowed,
        is_causal=causal and allowed is None,
        dropout_p=dropout,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.permute(2, 0, 1, 3).flatten(2)


def attention_is_fused(
    query: Tensor, key: Tensor, value: Tensor, *, allowed: Tensor | None = None, dropout: float = 0.0
) -> bool:
    """Whether ``attention`` runs a kernel that never stores its ``[heads, seq, keys]`` probabilities."""
    q, k, v = _heads_first(query, key, value)
    grouped = query.shape[2] != key.shape[2]
    choice = torch._fused_sdp_choice(q, k, v, allowed, dropout, allowed is None, enable_gqa=grouped)
    return choice != SDPBackend.MATH.value


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``[seq, batch, heads, head_dim]`` -> ``[batch, heads, seq, head_dim]``."""
    return tuple(tensor.permute(1, 2, 0, 3) for tensor in tensors)
