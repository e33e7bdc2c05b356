"""Splits the time of a step. The device is synchronised before the clock is read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "forward_backward", "communication", "optimizer")


class StepTimer:
    """Seconds of each phase of one step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of a block to a phase."""
        start = self._now()
        yield
        self.seconds[name] += self._now() - start

    def total(self) -> float:
        """Seconds since the step began."""
        return self._now() - self._start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
