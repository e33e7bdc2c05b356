"""The local part of cross entropy over a vocabulary that is cut over ranks: what needs no other rank.

With ``z`` the logits of a token, over the columns of all ranks: loss = log sum exp(z) - z[target], and its gradient is
softmax(z) - onehot(target). Each rank gives maximum, sum and target logit of its own columns; the caller joins them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_med.kernels.backend import operation
from megatron_med.kernels.opaque import Cost, opaque_operation

_ROWS = 256
"""Tokens at a time: what is computed in fp32 on the way never fills the memory."""


def _workspace(logits: Tensor) -> int:
    """fp32 columns of the rows at hand, and for each its target's column (8 bytes) and what is added there (1 + 4)."""
    columns = logits.shape[-1]
    return min(_ROWS, logits.numel() // max(1, columns)) * (4 * columns + 13)


def _forward_fake(logits: Tensor, targets: Tensor, true_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    maximum, total, target_logit = (logits.new_empty(targets.shape, dtype=torch.float32) for _ in range(3))
    return maximum, total, target_logit


def _forward_cost(logits: Tensor, targets: Tensor, true_columns: int) -> Cost:
    """The maximum reads the logits; then they are read, and fp32 differences written, replaced and summed."""
    count = logits.numel()
    return Cost(4.0 * count, count * (2 * logits.element_size() + 16), _workspace(logits))


@operation
@opaque_operation(_forward_fake, _forward_cost)
def cross_entropy_forward(logits: Tensor, targets: Tensor, true_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of this rank's columns, in fp32.

    Args:
        logits: ``[..., columns]``, contiguous as all arguments.
        targets: ``[...]``, columns of this rank; negative where another rank has it.
        true_columns: columns before the padding.

    Returns:
        Maximum, sum of exp(logits - maximum), and the target's logit (0 where another rank has it), ``[...]`` each.
    """
    maximum, total, target_logit = _forward_fake(logits, targets, true_columns)
    if true_columns == 0:
        return maximum.fill_(float("-inf")), total.zero_(), target_logit.zero_()
    parts = (each.view(-1).split(_ROWS) for each in (targets, maximum, total, target_logit))
    for padded, target, peak, summed, hit in zip(_rows(logits), *parts, strict=True):
        z = padded[:, :true_columns]
        peak.copy_(z.amax(dim=-1))
        summed.copy_((z - peak.unsqueeze(-1)).exp_().sum(dim=-1))
        hit.copy_(z.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)).masked_fill_(target < 0, 0)
    return maximum, total, target_logit


def _backward_fake(logits: Tensor, targets: Tensor, log_total: Tensor, grad: Tensor, true_columns: int) -> Tensor:
    return torch.empty_like(logits)


def _backward_cost(logits: Tensor, targets: Tensor, log_total: Tensor, grad: Tensor, true_columns: int) -> Cost:
    """Logits are read, fp32 probabilities written, replaced, scaled, and rounded into the result."""
    count = logits.numel()
    return Cost(4.0 * count, count * (2 * logits.element_size() + 24), _workspace(logits))


@operation
@opaque_operation(_backward_fake, _backward_cost)
def cross_entropy_backward(
    logits: Tensor, targets: Tensor, log_total: Tensor, grad: Tensor, true_columns: int
) -> Tensor:
    """(softmax - onehot) * grad on this rank's columns.

    Args:
        logits, targets, true_columns: as in ``cross_entropy_forward``.
        log_total: ``[...]`` fp32, log sum exp(logits) over the columns of all ranks.
        grad: ``[...]`` fp32, of each token's loss.

    Returns:
        ``[..., columns]`` in the type of the logits; 0 in the padding.
    """
    out = torch.empty_like(logits)
    parts = (each.view(-1).split(_ROWS) for each in (targets, log_total, grad))
    for z, result, target, shift, scale in zip(_rows(logits), _rows(out), *parts, strict=True):
        softmax = (z - shift.unsqueeze(-1)).exp_()
        softmax[:, true_columns:] = 0
        column = target.clamp(min=0).unsqueeze(-1)
        softmax.scatter_add_(-1, column, (target >= 0).to(softmax.dtype).neg_().unsqueeze(-1))
        result.copy_(softmax.mul_(scale.unsqueeze(-1)))
        del softmax, column  # before the next rows need theirs
    return out


def _rows(logits: Tensor) -> tuple[Tensor, ...]:
    return logits.view(-1, logits.shape[-1]).split(_ROWS)
