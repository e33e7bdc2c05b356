"""The local part of cross entropy over a vocabulary that is cut over ranks: what needs no other rank.

With ``z`` the logits of a token, over the columns of all ranks: loss = log sum exp(z) - z[target], and its gradient is
softmax(z) - onehot(target). Each rank gives maximum, sum and target logit of its own columns; the caller joins them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_med.kernels.backend import operation
from megatron_med.kernels.opaque import Cost, opaque_operation

BLOCK = 1 << 23
"""Logits that are taken at a time: 32 MiB in fp32, enough to fill a GPU, and never the whole vocabulary of a batch."""


def _rows_of_a_block(logits: Tensor) -> int:
    return max(1, BLOCK // logits.shape[-1])


def _workspace(logits: Tensor) -> int:
    """fp32 logits of a block, and for each row its target's column (8 bytes) and what is added there (1 + 4)."""
    columns = logits.shape[-1]
    return min(_rows_of_a_block(logits), logits.numel() // columns) * (4 * columns + 13)


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
    for padded, target, peak, summed, hit in _blocks(logits, logits, targets, maximum, total, target_logit):
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
    for z, result, target, shift, scale in _blocks(logits, logits, out, targets, log_total, grad):
        softmax = (z - shift.unsqueeze(-1)).exp_()
        softmax[:, true_columns:] = 0
        column = target.clamp(min=0).unsqueeze(-1)
        softmax.scatter_add_(-1, column, (target >= 0).to(softmax.dtype).neg_().unsqueeze(-1))
        result.copy_(softmax.mul_(scale.unsqueeze(-1)))
        del softmax, column  # before the next rows need theirs
    return out


def _blocks(logits: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of every tensor at a time: ``[rows, columns]`` of those with columns, ``[rows]`` of the others."""
    rows, shape = _rows_of_a_block(logits), logits.shape
    flat = (tensor.view(-1, shape[-1]) if tensor.shape == shape else tensor.view(-1) for tensor in tensors)
    return zip(*(tensor.split(rows) for tensor in flat), strict=True)
