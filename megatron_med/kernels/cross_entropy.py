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

BLOCK = {"cuda": 1 << 25}
CPU_BLOCK = 1 << 19
"""Logits that are taken at a time, never the whole vocabulary of a batch: on a GPU 128 MiB in fp32, which fill it; on a
CPU 2 MiB, which stay in its cache."""


def _forward_fake(logits: Tensor, targets: Tensor, true_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    maximum, total, target_logit = (logits.new_empty(targets.shape, dtype=torch.float32) for _ in range(3))
    return maximum, total, target_logit


def _forward_cost(logits: Tensor, targets: Tensor, true_columns: int) -> Cost:
    """The maximum reads the logits; softmax reads them and writes fp32, whose maximum is read."""
    count = logits.numel()
    return Cost(4.0 * count, count * (2 * logits.element_size() + 8), _softmax_workspace(logits))


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
        # One fused kernel; the largest probability is exp(0) / sum.
        summed.copy_(z.softmax(dim=-1, dtype=torch.float32).amax(dim=-1)).reciprocal_()
        hit.copy_(z.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)).masked_fill_(target < 0, 0)
    return maximum, total, target_logit


def _backward_fake(
    logits: Tensor, targets: Tensor, maximum: Tensor, total: Tensor, grad: Tensor, true_columns: int, out: Tensor
) -> None:
    return None


def _backward_cost(
    logits: Tensor, targets: Tensor, maximum: Tensor, total: Tensor, grad: Tensor, true_columns: int, out: Tensor
) -> Cost:
    """The logits are read and their distance to the maximum written in fp32, which is then changed three times and
    rounded into the result."""
    count, rows = logits.numel(), targets.numel()
    workspace = min(_rows_of_a_block(logits), rows) * (4 * logits.shape[-1] + 12)
    return Cost(4.0 * count, count * (2 * logits.element_size() + 28), workspace)


@operation
@opaque_operation(_backward_fake, _backward_cost, mutates=("out",))
def cross_entropy_backward(
    logits: Tensor, targets: Tensor, maximum: Tensor, total: Tensor, grad: Tensor, true_columns: int, out: Tensor
) -> None:
    """(softmax - onehot) * grad on this rank's columns, the softmax being exp(logits - maximum) / total.

    Args:
        logits, targets, true_columns: as in ``cross_entropy_forward``.
        maximum, total: ``[...]`` fp32, over the columns of all ranks.
        grad: ``[...]`` fp32, of each token's loss.
        out: gets the gradient, ``[..., columns]`` in the type of the logits, 0 in the padding. It may be the logits.
    """
    tensors = (logits, out, targets, maximum, total, grad)
    for padded, result, target, peak, summed, scale in _blocks(logits, *tensors):
        softmax = padded[:, :true_columns] - peak.unsqueeze(-1)  # fp32
        softmax.exp_().mul_((scale / summed).unsqueeze(-1))
        if true_columns:
            hit = (scale * (target >= 0)).neg_().unsqueeze(-1)
            softmax.scatter_add_(-1, target.clamp(min=0).unsqueeze(-1), hit)
            del hit
        result[:, :true_columns] = softmax
        result[:, true_columns:] = 0
        del softmax  # before the next rows need theirs


def _rows_of_a_block(logits: Tensor) -> int:
    return max(1, BLOCK.get(logits.device.type, CPU_BLOCK) // logits.shape[-1])


def _softmax_workspace(logits: Tensor, more: int = 0) -> int:
    """fp32 probabilities of a block, and ``more`` bytes a row afterwards. On the CPU half-precision logits are turned
    into fp32 first."""
    columns = logits.shape[-1]
    rows = min(_rows_of_a_block(logits), logits.numel() // columns)
    return rows * (4 * columns + (more if logits.dtype == torch.float32 else 4 * columns))


def _blocks(logits: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of every tensor at a time: ``[rows, columns]`` of those with columns, ``[rows]`` of the others."""
    rows, shape = _rows_of_a_block(logits), logits.shape
    flat = (tensor.view(-1, shape[-1]) if tensor.shape == shape else tensor.view(-1) for tensor in tensors)
    return zip(*(tensor.split(rows) for tensor in flat), strict=True)
