"""Moves tensors between neighbouring pipeline stages."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_med.parallel.collectives import Pending
from megatron_med.parallel.context import Axis, ParallelContext


class PipelineLink:
    """Sends to and receives from the neighbours of a stage, in a ring: after the last stage comes the first one's
    next chunk.

    Sends never block: their tensors are kept until they have left. Activations and gradients travel in groups of
    their own, and so does the way round from the last stage to the first, each in the order of its schedule:
    no direction waits for another.
    """

    def __init__(self, context: ParallelContext, dtype: torch.dtype) -> None:
        self._context = context
        self._dtype = dtype
        self._sent: list[Pending] = []

    def send_forward(self, hidden: Tensor) -> None:
        """Hidden states to the next stage."""
        context = self._context
        self._send(hidden, context.pp_wrap if context.pp.is_last else context.pp, +1)

    def receive_forward(self, shape: tuple[int, ...]) -> Pending:
        """Hidden states of the previous stage, ``[seq(/tp), batch, hidden]``."""
        context = self._context
        return self._receive(shape, context.pp_wrap if context.pp.is_first else context.pp, -1)

    def send_backward(self, gradient: Tensor) -> None:
        """Gradient of the received hidden states to the previous stage."""
        context = self._context
        self._send(gradient, context.pp_wrap_backward if context.pp.is_first else context.pp_backward, -1)

    def receive_backward(self, shape: tuple[int, ...]) -> Pending:
        """Gradient of the sent hidden states from the next stage."""
        context = self._context
        return self._receive(shape, context.pp_wrap_backward if context.pp.is_last else context.pp_backward, +1)

    def drain(self, keep: int = 0) -> None:
        """Waits until every send has left, but for the last ``keep`` ones."""
        while len(self._sent) > keep:
            self._sent.pop(0).wait()

    def _send(self, tensor: Tensor, axis: Axis, step: int) -> None:
        tensor = tensor.detach().contiguous()
        self._sent = [pending for pending in self._sent if not pending.is_completed()]
        self._sent.append(Pending(tensor, dist.isend(tensor, _neighbour(axis, step), group=axis.group)))

    def _receive(self, shape: tuple[int, ...], axis: Axis, step: int) -> Pending:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._context.device)
        work = dist.irecv(tensor, _neighbour(axis, step), group=axis.group)
        assert work is not None, "this rank takes no part in the pipeline's group"
        return Pending(tensor, work)


def _neighbour(axis: Axis, step: int) -> int:
    return axis.ranks[(axis.rank + step) % axis.size]
