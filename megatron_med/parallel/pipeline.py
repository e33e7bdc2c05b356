"""Executes a pipeline schedule on this rank's stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.p2p import PipelineLink
from megatron_med.parallel.schedule import Action, Forward

BatchT = TypeVar("BatchT")
BatchC = TypeVar("BatchC", contravariant=True)


class Stage(Protocol[BatchC]):
    """What the engine needs of a model."""

    def __call__(self, hidden: Tensor | None, batch: BatchC, /) -> Tensor:
        """Hidden states of the previous stage (None on the first) -> hidden states; logits on the last."""
        ...

    def loss(self, logits: Tensor, batch: BatchC, /) -> Tensor:
        """Sum of the micro-batch's masked token losses, in fp32."""
        ...

    def hidden_shape(self, batch: BatchC, /) -> tuple[int, ...]:
        """Shape of the hidden states that travel for this micro-batch."""
        ...


class PipelineEngine(Generic[BatchT]):
    """Runs lists of actions. One engine serves every schedule; a single stage is a pipeline of one.

    Args:
        stage: this rank's piece of the model.
        context: the grid.
        dtype: of the hidden states that travel.
    """

    def __init__(self, stage: Stage[BatchT], context: ParallelContext, dtype: torch.dtype) -> None:
        self._stage = stage
        self._context = context
        self._link = PipelineLink(context, dtype)

    def run(
        self,
        actions: Sequence[Action],
        batches: Sequence[BatchT],
        loss_scale: Tensor | None = None,
        before_last_backward: Callable[[], None] | None = None,
    ) -> Tensor:
        """Executes ``actions`` over ``batches``.

        Args:
            actions: this stage's list from a schedule.
            batches: the micro-batches, by index.
            loss_scale: factor of each micro-batch's loss sum in the backward pass.
            before_last_backward: called once before the last backward pass, when gradients become final.

        Returns:
            Sum of the losses of all micro-batches, fp32; zero on all stages but the last.
        """
        total = torch.zeros((), dtype=torch.float32, device=self._context.device)
        live: dict[int, tuple[Tensor | None, Tensor]] = {}
        backwards_left = sum(not isinstance(action, Forward) for action in actions)
        for action in actions:
            index = action.micro_batch
            if isinstance(action, Forward):
                received, out = self._forward(batches[index])
                if self._context.is_last_stage:
                    total += out.detach()
                if backwards_left:
                    live[index] = received, out
            else:
                backwards_left -= 1
                if backwards_left == 0 and before_last_backward is not None:
                    before_last_backward()
                self._backward(*live.pop(index), loss_scale)
        self._link.drain()
        return total

    def _forward(self, batch: BatchT) -> tuple[Tensor | None, Tensor]:
        received = None
        if not self._context.is_first_stage:
            received = self._link.receive_forward(self._stage.hidden_shape(batch))
            received.requires_grad_(torch.is_grad_enabled())
        out = self._stage(received, batch)
        if self._context.is_last_stage:
            return received, self._stage.loss(out, batch)
        self._link.send_forward(out)
        return received, out

    def _backward(self, received: Tensor | None, out: Tensor, loss_scale: Tensor | None) -> None:
        if self._context.is_last_stage:
            gradient = None if loss_scale is None else loss_scale.to(out.dtype)
        else:
            gradient = self._link.receive_backward(tuple(out.shape))
        torch.autograd.backward(out, gradient)
        if received is not None:
            assert received.grad is not None, "the stage did not use its input"
            self._link.send_backward(received.grad)
