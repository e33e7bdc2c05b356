"""Executes a pipeline schedule on this rank's chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_med.config.layers import Chunk
from megatron_med.parallel.collectives import Pending
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.pipeline_parallel.p2p import PipelineLink
from megatron_med.parallel.pipeline_parallel.schedule import Action, Backward, BackwardInput, BackwardWeight, Forward
from megatron_med.parallel.pipeline_parallel.weight_grad_store import WeightGrad, WeightGradStore
from megatron_med.parallel.tensor_parallel.layers import share_weight_grad_store

BatchT = TypeVar("BatchT")
BatchC = TypeVar("BatchC", contravariant=True)


class Stage(Protocol[BatchC]):
    """What the engine needs of one chunk of a model."""

    chunk: Chunk

    def __call__(self, hidden: Tensor | None, batch: BatchC, /, *, read_out: Any = None) -> Tensor:
        """Hidden states of the previous chunk (None on the first) -> hidden states; on the last what ``read_out``
        makes of them."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """The chunk and all of its parts."""
        ...

    def read_loss(self, batch: BatchC, scale: Tensor | None, /) -> Any:
        """A ``read_out`` that gives the sum of the micro-batch's masked token losses, in fp32.

        Args:
            batch: the micro-batch.
            scale: the gradient that the loss will get; None: no backward pass follows.
        """
        ...

    def hidden_shape(self, batch: BatchC, /) -> tuple[int, ...]:
        """Shape of the hidden states that travel for this micro-batch."""
        ...


@dataclass
class _Alive:
    """A micro-batch between its forward pass and the end of its backward pass.

    The output itself is not kept: once it is sent, its memory is free. Its place in the autograd graph is enough.
    """

    received: Tensor | None
    edge: GradientEdge | None
    loss: Tensor | None = None
    weight_grads: list[WeightGrad] = field(default_factory=list)


class PipelineEngine(Generic[BatchT]):
    """Runs lists of actions. One engine serves every schedule; a single stage is a pipeline of one.

    What the next action has to receive is asked for before the current one computes, and sends are not waited for,
    so transfers run during computation.

    Args:
        chunks: this rank's chunks of the model, first to last.
        context: the grid.
        dtype: of the hidden states that travel.
        before_backward: called before each whole backward pass with its chunk and whether it is that chunk's last.
    """

    def __init__(
        self,
        chunks: Sequence[Stage[BatchT]],
        context: ParallelContext,
        dtype: torch.dtype,
        before_backward: Callable[[int, bool], None] | None = None,
    ) -> None:
        self._chunks = chunks
        self._context = context
        self._link = PipelineLink(context, dtype)
        self._before_backward = before_backward
        self._weight_grads = WeightGradStore()
        for chunk in chunks:
            share_weight_grad_store(chunk.modules(), self._weight_grads)

    def run(self, actions: Sequence[Action], batches: Sequence[BatchT], loss_scale: Tensor | None = None) -> Tensor:
        """Executes ``actions`` over ``batches``.

        Args:
            actions: this stage's list from a schedule.
            batches: the micro-batches, by index.
            loss_scale: factor of each micro-batch's loss sum in the backward pass.

        Returns:
            Sum of the losses of all micro-batches, fp32; zero on all stages but the last.
        """
        total = torch.zeros((), dtype=torch.float32, device=self._context.device)
        # Between its two passes a micro-batch is known by its number and its chunk.
        alive: dict[tuple[int, int], _Alive] = {}
        trains = any(not isinstance(action, Forward) for action in actions)
        # FSDP2 reduces gradients in a chunk's last backward pass, so passes are counted down.
        backwards_left = [
            sum(isinstance(action, (Backward, BackwardInput)) and action.chunk == chunk for action in actions)
            for chunk in range(len(self._chunks))
        ]
        ahead = int(self._context.overlap.pipeline)
        arriving: dict[int, Pending | None] = {}
        for index, action in enumerate(actions):
            # The next action's message is asked for, too: it travels while this action computes.
            for later in range(index, min(index + 1 + ahead, len(actions))):
                if later not in arriving:
                    arriving[later] = self._ask(actions[later], batches)
            message = arriving.pop(index)
            key = action.micro_batch, action.chunk
            if isinstance(action, Forward):
                item = self._forward(action, batches[action.micro_batch], message, loss_scale if trains else None)
                if item.loss is not None:
                    total += item.loss.detach()
                if trains:  # validation lets go of everything at once
                    alive[key] = item
            elif isinstance(action, BackwardWeight):
                self._run_weight_grads(alive.pop(key))
            else:
                backwards_left[action.chunk] -= 1
                if self._before_backward is not None:
                    self._before_backward(action.chunk, backwards_left[action.chunk] == 0)
                self._backward(action, alive[key], message, loss_scale)
                if isinstance(action, Backward):  # after BackwardInput the weight gradients are still to come
                    del alive[key]
        # The caller may write into what was sent: a step ends when all of it has left.
        self._link.drain()
        return total

    def _ask(self, action: Action, batches: Sequence[BatchT]) -> Pending | None:
        """Begins to receive what an action needs of a neighbour."""
        stage = self._chunks[action.chunk]
        if isinstance(action, Forward):
            return None if stage.chunk.is_first else self._link.receive_forward(self._shape(action, batches))
        if isinstance(action, BackwardWeight) or stage.chunk.is_last:
            return None
        return self._link.receive_backward(self._shape(action, batches))

    def _shape(self, action: Action, batches: Sequence[BatchT]) -> tuple[int, ...]:
        return self._chunks[action.chunk].hidden_shape(batches[action.micro_batch])

    def _forward(self, action: Forward, batch: BatchT, arriving: Pending | None, loss_scale: Tensor | None) -> _Alive:
        stage = self._chunks[action.chunk]
        received = None
        if arriving is not None:
            # A leaf of this stage's graph: its gradient is what the stage before waits for.
            received = arriving.wait().requires_grad_(torch.is_grad_enabled())
        if stage.chunk.is_last:
            return _Alive(received, None, stage(received, batch, read_out=stage.read_loss(batch, loss_scale)))
        out = stage(received, batch)
        self._link.send_forward(out)
        return _Alive(received, get_gradient_edge(out) if out.requires_grad else None)

    @torch.no_grad()
    def _run_weight_grads(self, item: _Alive) -> None:
        for product in item.weight_grads:
            product()

    def _backward(self, action: Action, item: _Alive, arriving: Pending | None, loss_scale: Tensor | None) -> None:
        output = item.loss if item.loss is not None else item.edge
        gradient = loss_scale if arriving is None else arriving.wait()
        if output is None:
            return  # nothing up to here is trained, but the next stage has sent its gradient all the same
        if isinstance(action, BackwardInput):
            with self._weight_grads.defer() as item.weight_grads:
                torch.autograd.backward(output, gradient)
        else:
            torch.autograd.backward(output, gradient)
        # The graph goes before the gradient is sent, so that its memory is free for the next micro-batch.
        item.edge = item.loss = None
        received, item.received = item.received, None
        if received is not None:
            assert received.grad is not None, "the chunk did not use its input"
            self._link.send_backward(received.grad)
