"""One optimizer step over the global batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_med.model.batch import MicroBatch
from megatron_med.model.transformer import Transformer
from megatron_med.optim.optimizer import Optimizer
from megatron_med.parallel.collectives import all_reduce
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.data_parallel import DataParallel
from megatron_med.parallel.pipeline import PipelineEngine
from megatron_med.parallel.schedule import GENERATORS, forward_only
from megatron_med.train.timers import StepTimer


@dataclass
class Machinery:
    """What a step works with on this rank."""

    context: ParallelContext
    stage: Transformer
    engine: PipelineEngine[MicroBatch]
    data_parallel: DataParallel
    optimizer: Optimizer
    schedule: str


@dataclass(frozen=True)
class StepResult:
    """Equal on every rank.

    Attributes:
        loss: mean over the tokens of the global batch.
        gradient_norm: before clipping.
        skipped: the gradients were not finite and nothing was updated.
        stop_asked: some rank was signalled to stop.
    """

    loss: float
    gradient_norm: float
    skipped: bool
    stop_asked: bool


def train_step(
    machinery: Machinery, batches: Sequence[MicroBatch], lr: float, stop_asked: bool, timer: StepTimer
) -> StepResult:
    """Forward and backward over all micro-batches, reduction, clipping, update.

    Args:
        machinery: of this rank.
        batches: this data-parallel rank's micro-batches.
        lr: learning rate.
        stop_asked: whether this rank was signalled.
        timer: gets the phases' seconds.
    """
    local_loss = compute_gradients(machinery, batches, timer)
    with timer.phase("communication"):
        norm = machinery.optimizer.gradient_norm()
        loss, stop_together = _share(local_loss, stop_asked, machinery.context)
    norm_value = norm.item()
    finite = math.isfinite(norm_value)
    if finite:
        with timer.phase("optimizer"):
            machinery.optimizer.step(norm, lr)
    return StepResult(loss, norm_value, not finite, stop_together)


def compute_gradients(machinery: Machinery, batches: Sequence[MicroBatch], timer: StepTimer) -> Tensor:
    """Leaves the gradient of the global batch's mean loss in every owned slice, summed over all ranks.

    Returns:
        This rank's part of the loss: zero but on the last stage.
    """
    context = machinery.context
    machinery.stage.train()
    machinery.data_parallel.zero_gradients()
    with timer.phase("communication"):
        tokens = count_tokens(batches, context)
    actions = GENERATORS[machinery.schedule](context.pp.size, len(batches))[context.pp.rank]
    with timer.phase("forward_backward"):
        loss_sum = machinery.engine.run(
            actions,
            batches,
            loss_scale=1.0 / tokens,
            before_last_backward=machinery.data_parallel.reduce_with_next_backward,
        )
    with timer.phase("communication"):
        machinery.data_parallel.finish()
    return loss_sum / tokens


@torch.no_grad()
def validation_loss(machinery: Machinery, batches: Sequence[MicroBatch]) -> float:
    """Mean loss over the tokens of all samples, without dropout; equal on every rank."""
    context = machinery.context
    machinery.stage.eval()
    tokens = count_tokens(batches, context)
    actions = forward_only(context.pp.size, len(batches))[context.pp.rank]
    loss_sum = machinery.engine.run(actions, batches)
    return _share(loss_sum / tokens, False, context)[0]


def count_tokens(batches: Sequence[MicroBatch], context: ParallelContext) -> Tensor:
    """Tokens of the global batch whose loss counts: the denominator, known before the backward pass."""
    local = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum()
    return all_reduce(local, context.dp).float()


def _share(loss: Tensor, stop_asked: bool, context: ParallelContext) -> tuple[float, bool]:
    """Sums the loss over the data-parallel ranks of the last stage, and the stop flags, in one collective."""
    counted = loss if context.tp.is_first else torch.zeros_like(loss)
    values = torch.stack([counted.double(), counted.new_tensor(float(stop_asked)).double()])
    all_reduce(values, context.world)
    total, stops = values.tolist()
    return total, stops > 0
