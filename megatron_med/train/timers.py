"""Splits the time of a step. On a GPU phases are bounded by events on the compute stream, so that measuring never
waits for communication that is meant to run on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "forward_backward", "communication", "optimizer")

_Mark = float | torch.cuda.Event


class StepTimer:
    """Seconds of each phase of one step."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._start = time.perf_counter()
        self._spans: list[tuple[str, _Mark, _Mark]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of a block to a phase."""
        start = self._mark()
        yield
        self._spans.append((name, start, self._mark()))

    def total(self) -> float:
        """Seconds since the step began, on the host."""
        return time.perf_counter() - self._start

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far; waits until the computation of the last one has ended."""
        split = dict.fromkeys(PHASES, 0.0)
        for name, start, end in self._spans:
            split[name] += _between(start, end)
        return split

    def _mark(self) -> _Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(start: _Mark, end: _Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float), "one clock for both marks"  # noqa: PT018
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000
