"""The head's product and the loss in one, some tokens at a time: the logits of a micro-batch never exist whole.

The gradient of a token's logits is known as soon as its logits are, but for the factor of the loss. That goes in
beforehand, so the forward pass turns logits into gradients where they stand and takes both products of the backward
pass at once (Hsu et al. 2024, Liger Kernel), over a vocabulary that is cut over tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megatron_med.kernels.cross_entropy import cross_entropy_backward
from megatron_med.kernels.linear import LocalLinear
from megatron_med.parallel.collectives import start_all_gather, start_all_reduce, start_reduce_scatter
from megatron_med.parallel.context import Axis
from megatron_med.parallel.parameters import MainGrad, main_grad_of
from megatron_med.parallel.tensor_parallel.cross_entropy import LocalVocabulary, token_losses
from megatron_med.parallel.tensor_parallel.linear import InputMode

BLOCK = {"cuda": 256 << 20}
CPU_BLOCK = 16 << 20
"""Bytes of logits that are not worth cutting: on a GPU what fills it, on a CPU what a cache may hold."""
MOST_PIECES = 8
"""Each piece adds to the whole gradient of the head's weight, which is read and written for it."""


@dataclass(frozen=True)
class HeadLoss:
    """How the loss of a micro-batch is computed.

    Attributes:
        local: the head's products.
        mode: of its input, as in ``LinearPlan``.
        tp: the tensor-parallel axis.
        vocab_size: without the padding.
        scale: the gradient that the loss will get, a scalar; None: no gradients are wanted.
    """

    local: LocalLinear
    mode: InputMode
    tp: Axis
    vocab_size: int
    scale: Tensor | None


def vocab_parallel_head_loss(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, plan: HeadLoss) -> Tensor:
    """Sum of the masked losses of all tokens, a scalar in fp32, equal on every tensor-parallel rank.

    The gradient of a weight with a main gradient is added to it in the forward pass. The backward pass must be called
    with ``plan.scale``.

    Args:
        x: ``[seq(/tp), batch, hidden]``, the head's input.
        weight: ``[padded_vocab/tp, hidden]``.
        targets: ``[seq, batch]``, ids in the whole vocabulary.
        mask: ``[seq, batch]``, factors of the losses.
        plan: how.
    """
    trains = plan.scale is not None and torch.is_grad_enabled()
    main_grad = main_grad_of(weight) if trains and weight.requires_grad else None
    wanted = _Wanted(trains and x.requires_grad, trains and weight.requires_grad, main_grad)
    if main_grad is not None:
        weight = weight.detach()  # as in parallel_linear: its gradient goes past autograd
        if not x.requires_grad:
            x = x.detach().requires_grad_()
    return _HeadLoss.apply(x, weight, targets, mask, plan, wanted)


@dataclass(frozen=True)
class _Wanted:
    """Gradients that the forward pass computes."""

    of_x: bool
    of_weight: bool
    main_grad: MainGrad | None


class _HeadLoss(Function):
    """Forward: the loss; with G = (softmax - one-hot) * mask * scale also dX = G W and dW = G^T X, summed over pieces
    of tokens. Backward: hands them on, dX summed over ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, plan: HeadLoss, wanted: _Wanted
    ) -> Tensor:
        whole = start_all_gather(x, plan.tp).wait() if plan.mode == "gather" else x
        vocabulary = LocalVocabulary.of(weight.shape[0], plan.vocab_size, plan.tp)
        rows = whole.flatten(0, 1)
        target, factor = vocabulary.local(targets).flatten(), mask.flatten().float()
        losses = torch.empty_like(factor)
        grad = None if plan.scale is None else factor * plan.scale
        input_grad = torch.empty_like(rows) if wanted.of_x else None
        weight_grad = _sum_of_weight_grads(weight, wanted)
        for piece in _pieces(rows, weight):
            logits, _ = plan.local.forward(rows[piece], weight)
            losses[piece], *statistics = token_losses(logits, target[piece], vocabulary.true_columns, plan.tp)
            if input_grad is None and weight_grad is None:
                continue
            assert grad is not None, "gradients are wanted with a scale only"
            arguments = (logits, target[piece], *statistics, grad[piece], vocabulary.true_columns)
            cross_entropy_backward(*arguments, logits)  # in place
            if input_grad is not None:
                input_grad[piece] = plan.local.input_grad(weight, (), logits)
            if weight_grad is not None:
                plan.local.weight_grad(rows[piece], (), logits, out=weight_grad)
            del logits, arguments
        ctx.plan, ctx.main_grad, ctx.dtype = plan, wanted.main_grad, weight.dtype
        ctx.input_grad = None if input_grad is None else input_grad.view(whole.shape)
        ctx.weight_grad = weight_grad if wanted.main_grad is None else None
        return (losses * factor).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input_grad, weight_grad = ctx.input_grad, ctx.weight_grad
        ctx.input_grad = ctx.weight_grad = None  # so that they are freed as soon as they are used
        if input_grad is not None and ctx.plan.mode != "local":
            start = start_reduce_scatter if ctx.plan.mode == "gather" else start_all_reduce
            input_grad = start(input_grad, ctx.plan.tp).wait()
        if ctx.main_grad is not None:
            ctx.main_grad.register_grad_ready()
        return input_grad, None if weight_grad is None else weight_grad.to(ctx.dtype), None, None, None, None


def _sum_of_weight_grads(weight: Tensor, wanted: _Wanted) -> Tensor | None:
    """The main gradient, or an fp32 sum over the pieces."""
    if not wanted.of_weight:
        return None
    if wanted.main_grad is not None:
        return wanted.main_grad.total
    return torch.zeros_like(weight, dtype=torch.float32)


def _pieces(rows: Tensor, weight: Tensor) -> list[slice]:
    """Tokens that are taken at a time, as few pieces as their logits allow."""
    count = rows.shape[0]
    size = count * weight.shape[0] * rows.element_size()
    pieces = min(MOST_PIECES, max(1, -(-size // BLOCK.get(rows.device.type, CPU_BLOCK))), max(1, count))
    step = -(-count // pieces)
    return [slice(start, min(start + step, count)) for start in range(0, count, max(1, step))]
