"""One optimizer step over the global batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_med.model.batch import MicroBatch
from megatron_med.optim.loss_scale import LossScaler
from megatron_med.optim.optimizer import Optimizer
from megatron_med.parallel.collectives import all_reduce
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.data_parallel.base import DataParallel
from megatron_med.parallel.pipeline_parallel.engine import PipelineEngine
from megatron_med.parallel.pipeline_parallel.schedule import GENERATORS, forward_only
from megatron_med.train.timers import StepTimer


@dataclass
class TrainModule:
    """What a step works with on this rank."""

    context: ParallelContext
    chunks: nn.ModuleList
    engine: PipelineEngine[MicroBatch]
    data_parallel: DataParallel
    optimizer: Optimizer
    schedule: str
    loss_scaler: LossScaler | None = None


@dataclass(frozen=True)
class StepResult:
    """Equal on every rank.

    Attributes:
        loss: mean over the tokens of the global batch.
        gradient_norm: before clipping.
        skipped: the gradients were not finite and nothing was updated.
        bad: skipped, and no lower loss scale could help.
        stop_asked: some rank was signalled to stop.
        loss_scale: that the gradients were computed with.
    """

    loss: float
    gradient_norm: float
    skipped: bool
    bad: bool
    stop_asked: bool
    loss_scale: float


def train_step(
    train_module: TrainModule, batches: Sequence[MicroBatch], lr: float, stop_asked: bool, timer: StepTimer
) -> StepResult:
    """Forward and backward over all micro-batches, reduction, clipping, update.

    Args:
        train_module: of this rank.
        batches: this data-parallel rank's micro-batches.
        lr: learning rate.
        stop_asked: whether this rank was signalled.
        timer: gets the phases' seconds.
    """
    scaler = train_module.loss_scaler
    scale = scaler.scale if scaler is not None else 1.0
    local_loss = compute_gradients(train_module, batches, timer)
    with timer.phase("communication"):
        norm = train_module.optimizer.gradient_norm() / scale
        loss, stop_together = _share(local_loss, stop_asked, train_module.context)
    norm_value = norm.item()
    finite = math.isfinite(norm_value)
    if finite:
        with timer.phase("optimizer"):
            train_module.optimizer.step(norm, lr, scale)
    at_its_limit = scaler is None or scaler.at_minimum
    if scaler is not None:
        scaler.update(overflow=not finite)
    return StepResult(loss, norm_value, not finite, not finite and at_its_limit, stop_together, scale)


def compute_gradients(train_module: TrainModule, batches: Sequence[MicroBatch], timer: StepTimer) -> Tensor:
    """Leaves the gradient of the global batch's mean loss, times the loss scale, in every owned shard, summed over
    all ranks.

    Returns:
        This rank's part of the loss: zero but on the last stage.
    """
    context = train_module.context
    train_module.chunks.train()
    train_module.data_parallel.begin_step(len(batches))
    with timer.phase("communication"):
        tokens = count_tokens(batches, context)
    schedule = GENERATORS[train_module.schedule](context.pp.size, len(batches), len(train_module.chunks))
    scale = train_module.loss_scaler.scale if train_module.loss_scaler is not None else 1.0
    with timer.phase("forward_backward"):
        loss_sum = train_module.engine.run(schedule[context.pp.rank], batches, loss_scale=scale / tokens)
    with timer.phase("communication"):
        train_module.data_parallel.finalize_grads()
    return loss_sum / tokens


@torch.no_grad()
def validation_loss(train_module: TrainModule, batches: Sequence[MicroBatch]) -> float:
    """Mean loss over the tokens of all samples, without dropout; equal on every rank."""
    context = train_module.context
    train_module.chunks.eval()
    tokens = count_tokens(batches, context)
    actions = forward_only(context.pp.size, len(batches), len(train_module.chunks))[context.pp.rank]
    loss_sum = train_module.engine.run(actions, batches)
    return _share(loss_sum / tokens, False, context)[0]


def count_tokens(batches: Sequence[MicroBatch], context: ParallelContext) -> Tensor:
    """Tokens of the global batch whose loss counts: the denominator, known before the backward pass."""
    local = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum()
    return all_reduce(local, context.loss).float()


def _share(loss: Tensor, stop_asked: bool, context: ParallelContext) -> tuple[float, bool]:
    """Sums the loss over the data-parallel ranks of the last stage, and the stop flags, in one collective."""
    counted = loss if context.tp.is_first else torch.zeros_like(loss)
    values = torch.stack([counted.double(), counted.new_tensor(float(stop_asked)).double()])
    all_reduce(values, context.world)
    total, stops = values.tolist()
    return total, stops > 0
