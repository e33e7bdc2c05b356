"""Cross entropy over a vocabulary that is cut over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron_med.kernels.cross_entropy import cross_entropy_backward, cross_entropy_forward
from megatron_med.parallel.collectives import all_reduce
from megatron_med.parallel.context import Axis


class _VocabParallelCrossEntropy(Function):
    """Forward: log sum exp - the target's logit, with maximum, sum and the target's logit all-reduced.
    Backward: (softmax - one-hot) * gradient, on each rank's own columns."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, true_columns: int, tp: Axis) -> Tensor:
        local_maximum, local_total, target_logit = cross_entropy_forward(logits, targets, true_columns)
        maximum = all_reduce(local_maximum.clone(), tp, dist.ReduceOp.MAX)
        all_reduce(target_logit, tp)
        local_total.mul_((local_maximum - maximum).exp_())
        total = all_reduce(local_total.clone(), tp)
        ctx.save_for_backward(logits, targets, local_total.div_(total))
        ctx.true_columns = true_columns
        return total.log_().add_(maximum).sub_(target_logit)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return cross_entropy_backward(*ctx.saved_tensors, gradients[0].contiguous(), ctx.true_columns), None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int, tp: Axis) -> Tensor:
    """Loss of each token, in fp32.

    Args:
        logits: ``[..., padded_vocab/tp]``, this rank's columns.
        targets: ``[...]``, ids in the whole vocabulary.
        vocab_size: true size; the padded columns after it take no part in the softmax.
        tp: the tensor-parallel axis.

    Returns:
        ``[...]``, equal on every tensor-parallel rank.
    """
    columns = logits.shape[-1]
    first_column = tp.rank * columns
    true_columns = min(max(vocab_size - first_column, 0), columns)
    local = targets - first_column
    local = local.masked_fill((local < 0) | (local >= columns), -1).contiguous()
    return _VocabParallelCrossEntropy.apply(logits, local, true_columns, tp)
