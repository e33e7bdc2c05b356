"""Kernels of ``csrc/kernels`` for training, with their gradients, under the names and with the arguments of the
references. Each saves its input and, where that is a number a row, what the statistics have cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_med.kernels.native import OPERATIONS, KernelFunction
from megatron_med.kernels.opaque import NAMESPACE, Cost, declare_cost


def takes(x: Tensor, *_: Any) -> bool:
    """Whether there is a kernel for its type."""
    return x.dtype in (torch.float32, torch.bfloat16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``functional.rms_norm``."""
    return _RMSNorm.call(x.contiguous(), weight, eps)


class _RMSNorm(KernelFunction):
    """Keeps 1 / rms of each row, fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scales = OPERATIONS.rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scales = ctx.saved_tensors
        of_x, of_weight = OPERATIONS.rms_norm_backward(gradients[0].contiguous(), x, weight, scales)
        return of_x, of_weight.to(weight.dtype), None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See ``functional.layer_norm``."""
    return _LayerNorm.call(x.contiguous(), weight, bias, eps)


class _LayerNorm(KernelFunction):
    """Keeps mean and 1 / std of each row, fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, means, scales = OPERATIONS.layer_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, means, scales)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, means, scales = ctx.saved_tensors
        of_x, of_parameters = OPERATIONS.layer_norm_backward(gradients[0].contiguous(), x, weight, means, scales)
        of_weight, of_bias = of_parameters.to(weight.dtype).chunk(2)
        return of_x, of_weight, of_bias, None


def gelu_tanh(x: Tensor) -> Tensor:
    """See ``functional.gelu_tanh``."""
    return _Gelu.call(x.contiguous())


class _Gelu(KernelFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return OPERATIONS.gelu_forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return OPERATIONS.gelu_backward(gradients[0].contiguous(), *ctx.saved_tensors)


def split_qkv(mixed: Tensor, queries: int, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """See ``functional.split_qkv``."""
    cos, sin = (None, None) if rotary is None else (angles.contiguous() for angles in rotary)
    return _SplitQKV.call(mixed.contiguous(), queries, cos, sin)


class _SplitQKV(KernelFunction):
    """Keeps cosines and sines, which all layers share."""

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, queries: int, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return OPERATIONS.split_qkv_forward(mixed, cos, sin, queries)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in gradients)
        return OPERATIONS.split_qkv_backward(query, key, value, *ctx.saved_tensors), None, None, None


def swiglu(gate_up: Tensor) -> Tensor:
    """See ``functional.swiglu``."""
    return _SwiGLU.call(gate_up.contiguous())


class _SwiGLU(KernelFunction):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return OPERATIONS.swiglu_forward(gate_up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return OPERATIONS.swiglu_backward(gradients[0].contiguous(), *ctx.saved_tensors)


def cross_entropy_forward(logits: Tensor, targets: Tensor, true_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """See ``cross_entropy.cross_entropy_forward``."""
    return OPERATIONS.cross_entropy_statistics(logits, targets, true_columns)


def cross_entropy_backward(
    logits: Tensor, targets: Tensor, maximum: Tensor, total: Tensor, grad: Tensor, true_columns: int, out: Tensor
) -> None:
    """See ``cross_entropy.cross_entropy_backward``."""
    OPERATIONS.cross_entropy_gradient(logits, targets, maximum, total, grad, true_columns, out)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.library.register_fake(f"{NAMESPACE}::rms_norm_forward")
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(_rows(x), dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::rms_norm_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[-1], dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::layer_norm_forward")
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    means, scales = (x.new_empty(_rows(x), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), means, scales


@torch.library.register_fake(f"{NAMESPACE}::layer_norm_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, means: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(2 * x.shape[-1], dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::gelu_forward")
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake(f"{NAMESPACE}::gelu_backward")
def _(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake(f"{NAMESPACE}::split_qkv_forward")
def _(mixed: Tensor, cos: Tensor | None, sin: Tensor | None, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    seq, batch, groups, _, head_dim = mixed.shape
    key, value = (mixed.new_empty(seq, batch, groups, head_dim) for _ in range(2))
    return mixed.new_empty(seq, batch, groups * queries, head_dim), key, value


@torch.library.register_fake(f"{NAMESPACE}::split_qkv_backward")
def _(query: Tensor, key: Tensor, value: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    seq, batch, groups, head_dim = key.shape
    return key.new_empty(seq, batch, groups, query.shape[2] // groups + 2, head_dim)


@torch.library.register_fake(f"{NAMESPACE}::swiglu_forward")
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.register_fake(f"{NAMESPACE}::swiglu_backward")
def _(grad: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up)


@torch.library.register_fake(f"{NAMESPACE}::cross_entropy_statistics")
def _(logits: Tensor, targets: Tensor, true_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    maximum, total, hit = (targets.new_empty(targets.shape, dtype=torch.float32) for _ in range(3))
    return maximum, total, hit


@torch.library.register_fake(f"{NAMESPACE}::cross_entropy_gradient")
def _(
    logits: Tensor, targets: Tensor, maxima: Tensor, totals: Tensor, grads: Tensor, true_columns: int, out: Tensor
) -> None:
    return None


ROWS_OF_A_BLOCK = 64
"""Whose weight gradients are summed one after the other: see rows.h."""


def _sums(x: Tensor, vectors: int) -> int:
    """Bytes of the blocks' own sums."""
    return 4 * vectors * x.shape[-1] * -(-_rows(x) // ROWS_OF_A_BLOCK)


declare_cost("rms_norm_forward", lambda x, weight, eps: Cost(4.0 * x.numel(), 2 * _bytes(x) + 4 * _rows(x)))
declare_cost(
    "rms_norm_backward",
    lambda grad, x, weight, scales: Cost(10.0 * x.numel(), 3 * _bytes(x) + 4 * _rows(x), _sums(x, 1)),
)
declare_cost("layer_norm_forward", lambda x, *_: Cost(7.0 * x.numel(), 2 * _bytes(x) + 8 * _rows(x)))
declare_cost(
    "layer_norm_backward",
    lambda grad, x, *_: Cost(14.0 * x.numel(), 3 * _bytes(x) + 8 * _rows(x), _sums(x, 2)),
)
declare_cost("gelu_forward", lambda x: Cost(8.0 * x.numel(), 2 * _bytes(x)))
declare_cost("gelu_backward", lambda grad, x: Cost(14.0 * x.numel(), 3 * _bytes(x)))
declare_cost(
    "split_qkv_forward",
    lambda mixed, cos, sin, queries: Cost(
        0.0 if cos is None else 3.0 * mixed.numel(), 2 * _bytes(mixed) + (0 if cos is None else _bytes(cos, sin))
    ),
)
declare_cost(
    "split_qkv_backward",
    lambda query, key, value, cos, sin: Cost(
        0.0 if cos is None else 3.0 * query.numel(),
        2 * _bytes(query, key, value) + (0 if cos is None else _bytes(cos, sin)),
    ),
)
declare_cost("swiglu_forward", lambda gate_up: Cost(3.0 * gate_up.numel(), _bytes(gate_up) * 3 // 2))
declare_cost("swiglu_backward", lambda grad, gate_up: Cost(6.0 * gate_up.numel(), _bytes(grad) + 2 * _bytes(gate_up)))
declare_cost(
    "cross_entropy_statistics",
    lambda logits, targets, true_columns: Cost(4.0 * logits.numel(), _bytes(logits, targets) + 12 * targets.numel()),
)
declare_cost(
    "cross_entropy_gradient",
    lambda logits, targets, *_: Cost(5.0 * logits.numel(), 2 * _bytes(logits) + 20 * targets.numel()),
)
