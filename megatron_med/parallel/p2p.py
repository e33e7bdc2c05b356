"""Moves tensors between neighbouring pipeline stages."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_med.parallel.context import Axis, ParallelContext


class PipelineLink:
    """Sends to and receives from the neighbours of a stage.

    Sends never block: their tensors are kept until ``drain``. Activations and gradients travel in groups of
    their own, each in the order of micro-batches, so neither direction waits for the other.
    """

    def __init__(self, context: ParallelContext, dtype: torch.dtype) -> None:
        self._context = context
        self._dtype = dtype
        self._pending: list[tuple[dist.Work | None, Tensor]] = []

    def send_forward(self, hidden: Tensor) -> None:
        """Hidden states to the next stage."""
        self._send(hidden, self._context.pp, +1)

    def receive_forward(self, shape: tuple[int, ...]) -> Tensor:
        """Hidden states of the previous stage, ``[seq(/tp), batch, hidden]``."""
        return self._receive(shape, self._context.pp, -1)

    def send_backward(self, gradient: Tensor) -> None:
        """Gradient of the received hidden states to the previous stage."""
        self._send(gradient, self._context.pp_backward, -1)

    def receive_backward(self, shape: tuple[int, ...]) -> Tensor:
        """Gradient of the sent hidden states from the next stage."""
        return self._receive(shape, self._context.pp_backward, +1)

    def drain(self) -> None:
        """Waits until every send has left."""
        for work, _ in self._pending:
            if work is not None:
                work.wait()
        self._pending.clear()

    def _send(self, tensor: Tensor, axis: Axis, step: int) -> None:
        tensor = tensor.detach().contiguous()
        self._pending = [(work, kept) for work, kept in self._pending if work is not None and not work.is_completed()]
        self._pending.append((dist.isend(tensor, axis.ranks[axis.rank + step], group=axis.group), tensor))

    def _receive(self, shape: tuple[int, ...], axis: Axis, step: int) -> Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._context.device)
        work = dist.irecv(tensor, axis.ranks[axis.rank + step], group=axis.group)
        assert work is not None, "this rank takes no part in the pipeline's group"
        work.wait()
        return tensor
