"""SIGTERM and SIGUSR1 ask for a save. The flag travels with the step's metrics, so that all ranks stop together."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Remembers that a signal came.

    Attributes:
        name: of the signal; empty while none came.
    """

    def __init__(self) -> None:
        self.name = ""

    def listen(self) -> None:
        """Takes over SIGTERM and SIGUSR1 of this process."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    @property
    def asked(self) -> bool:
        return bool(self.name)
