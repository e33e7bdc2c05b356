"""Cross entropy over a vocabulary that is cut over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron_med.kernels.cross_entropy import cross_entropy_backward, cross_entropy_forward
from megatron_med.parallel.collectives import all_reduce
from megatron_med.parallel.context import Axis


class TokenLosses(NamedTuple):
    """Losses of tokens, and what their gradient needs, all of the targets' shape and in fp32.

    Attributes:
        losses: log sum exp - the target's logit.
        maximum, total: of the logits, and of exp(logits - maximum), over the columns of all ranks.
    """

    losses: Tensor
    maximum: Tensor
    total: Tensor


def token_losses(logits: Tensor, targets: Tensor, true_columns: int, tp: Axis) -> TokenLosses:
    """Maximum, sum and the target's logit are all-reduced. Arguments as in ``kernels.cross_entropy_forward``."""
    maximum, total, target_logit = cross_entropy_forward(logits, targets, true_columns)
    if tp.size > 1:
        local_maximum = maximum.clone()
        all_reduce(maximum, tp, dist.ReduceOp.MAX)
        all_reduce(target_logit, tp)
        all_reduce(total.mul_((local_maximum - maximum).exp_()), tp)
    return TokenLosses(total.log().add_(maximum).sub_(target_logit), maximum, total)


@dataclass(frozen=True)
class LocalVocabulary:
    """This rank's columns of the logits.

    Attributes:
        first: the first one's number in the whole vocabulary.
        columns: how many there are.
        true_columns: those before the padding.
    """

    first: int
    columns: int
    true_columns: int

    @classmethod
    def of(cls, columns: int, vocab_size: int, tp: Axis) -> LocalVocabulary:
        """``vocab_size``: the true one; the padded columns after it take no part in the softmax."""
        first = tp.rank * columns
        return cls(first, columns, min(max(vocab_size - first, 0), columns))

    def local(self, targets: Tensor) -> Tensor:
        """Ids in the whole vocabulary -> columns of this rank, -1 where another one has it; contiguous."""
        local = targets - self.first
        return local.masked_fill((local < 0) | (local >= self.columns), -1).contiguous()


class _VocabParallelCrossEntropy(Function):
    """Forward: log sum exp - the target's logit. Backward: (softmax - one-hot) * gradient, on each rank's columns."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, true_columns: int, tp: Axis) -> Tensor:
        losses, maximum, total = token_losses(logits, targets, true_columns, tp)
        ctx.save_for_backward(logits, targets, maximum, total)
        ctx.true_columns = true_columns
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits, *statistics = ctx.saved_tensors
        out = torch.empty_like(logits)
        cross_entropy_backward(logits, *statistics, gradients[0].contiguous(), ctx.true_columns, out)
        return out, None, None, None


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
    vocabulary = LocalVocabulary.of(logits.shape[-1], vocab_size, tp)
    return _VocabParallelCrossEntropy.apply(logits, vocabulary.local(targets), vocabulary.true_columns, tp)
