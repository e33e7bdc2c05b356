"""Cross entropy over a vocabulary that is cut over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron_med.parallel.collectives import all_reduce
from megatron_med.parallel.context import Axis


class _VocabParallelCrossEntropy(Function):
    """Forward: -log softmax at the target, with the maximum, the sum and the target's logit all-reduced.
    Backward: (softmax - one-hot) * gradient, on each rank's own columns."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first_column: int, true_columns: int, tp: Axis) -> Tensor:
        maximum = logits.new_full(logits.shape[:-1], float("-inf"), dtype=torch.float32)
        if true_columns > 0:
            maximum = logits[..., :true_columns].amax(dim=-1).float()
        all_reduce(maximum, tp, dist.ReduceOp.MAX)
        wide = logits - maximum.unsqueeze(-1)  # a new tensor, fp32
        wide[..., true_columns:] = float("-inf")
        columns = wide.shape[-1]
        local = targets - first_column
        elsewhere = (local < 0) | (local >= columns)
        local = local.masked_fill(elsewhere, 0).unsqueeze(-1)
        target_logit = wide.gather(-1, local).squeeze(-1).masked_fill(elsewhere, 0)
        all_reduce(target_logit, tp)
        total = all_reduce(wide.exp_().sum(dim=-1), tp)
        ctx.save_for_backward(wide.div_(total.unsqueeze(-1)), local, elsewhere)
        ctx.logits_dtype = logits.dtype
        return total.log() - target_logit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        softmax, local, elsewhere = ctx.saved_tensors
        hit = torch.where(elsewhere, 0.0, -1.0).unsqueeze(-1).to(softmax.dtype)
        grad = softmax.scatter_add_(-1, local, hit).mul_(gradients[0].unsqueeze(-1))
        return grad.to(ctx.logits_dtype), None, None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int, tp: Axis) -> Tensor:
    """Loss of each token, in fp32.

    Args:
        logits: ``[..., padded_vocab/tp]``, this rank's columns.
        targets: ``[...]``, ids in the whole vocabulary.
        vocab_size: true size; the padded columns behind it take no part in the softmax.
        tp: the tensor-parallel axis.

    Returns:
        ``[...]``, equal on every tensor-parallel rank.
    """
    columns = logits.shape[-1]
    first_column = tp.rank * columns
    true_columns = min(max(vocab_size - first_column, 0), columns)
    return _VocabParallelCrossEntropy.apply(logits, targets, first_column, true_columns, tp)
