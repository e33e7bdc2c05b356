"""Heads that score sequences in place of writing: classes of a text, or the options of a question.

The last token of a sequence is scored by a linear map of its hidden state (BioMedLM: Bolton et al. 2024). Labels are
laid down token by token: 0 where nothing is asked; ``1 + class`` at the last token of a text that is classified; and at
the last token of an option ``1 + 2 * question + (1 if it is the right one)``, questions counted within their row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_med.config import ModelConfig
from megatron_med.config.schema import MULTIPLE_CHOICE
from megatron_med.kernels.linear import linear
from megatron_med.model.batch import MicroBatch
from megatron_med.parallel.collectives import gather_sequence
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import ParameterLayout, make_parameter
from megatron_med.parallel.tensor_parallel.layers import replicated_layout


class ScoreHead(nn.Module):
    """``[seq(/tp), batch, hidden] -> [seq, batch, labels]``. Every tensor-parallel rank holds it whole.

    A choice has one label and a bias, a class has no bias.
    """

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self._is_choice = config.head == MULTIPLE_CHOICE
        self._context = context
        layout = ParameterLayout(
            (config.num_labels, config.hidden_size),
            partial_over_tp=context.sequence_parallel,
            init_std=config.init_std,
        )
        self.weight = make_parameter(layout, context, dtype)
        self.bias = None
        if self._is_choice:
            self.bias = make_parameter(replicated_layout((config.num_labels,), "zeros", context), context, dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        scores = linear(hidden, self.weight, self.bias)
        return gather_sequence(scores, self._context.tp) if self._context.sequence_parallel else scores

    def loss(self, scores: Tensor, batch: MicroBatch) -> Tensor:
        """Sum of the cross entropies, fp32: over the classes of each text, or over the options of each question."""
        labels, mask = batch.labels.t(), batch.loss_mask.t()
        losses = choice_losses(scores[..., 0].float(), labels) if self._is_choice else class_losses(scores, labels)
        return (losses * mask).sum()


def class_losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every token's class.

    Args:
        scores: ``[seq, batch, classes]``.
        labels: ``[seq, batch]``, 1 + class; what stands where it is 0 means nothing.

    Returns:
        ``[seq, batch]``.
    """
    log_probabilities = scores.float().log_softmax(-1)
    return -log_probabilities.gather(-1, (labels - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)


def choice_losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy over the options of every question, at each of its options as if that were the right one.

    Args:
        scores: ``[seq, batch]`` fp32.
        labels: ``[seq, batch]``, 1 + 2 * question (+ 1), questions counted within their column; 0: no option.

    Returns:
        ``[seq, batch]``; what stands at tokens that are no option means nothing.
    """
    asked = labels > 0
    question = ((labels - 1) // 2).clamp(min=0)
    hidden = scores.masked_fill(~asked, -torch.inf)
    highest = torch.full_like(scores, -torch.inf).scatter_reduce(0, question, hidden.detach(), "amax")
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    weights = (hidden - highest.gather(0, question)).exp()
    totals = torch.zeros_like(scores).scatter_add(0, question, weights)
    log_total = totals.clamp(min=torch.finfo(torch.float32).tiny).log() + highest
    return log_total.gather(0, question) - scores
