"""Signals ask for a save, and so does a launcher that is gone. The flag travels with the step's metrics, so that all
ranks stop together."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

LAUNCHER_GONE = "the launcher is gone"


class StopRequest:
    """Remembers that a signal came, and notices when the launcher has died.

    torchrun gives each rank a session of its own, so nothing ends the ranks when torchrun is killed. Its death is seen
    by a changed parent, which holds where torchrun is process 1, too.

    Attributes:
        signal_name: of the signal; empty while none came.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._terminals: list[int] = []

    def listen(self) -> None:
        """Takes over SIGTERM, SIGUSR1, SIGINT, and SIGHUP unless nohup has turned it off."""
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        is_first = not self.signal_name
        self.signal_name = self.signal_name or signal.Signals(number).name
        if number == signal.SIGHUP:
            self._leave_terminals()
        is_alone = self._launcher is None and number == signal.SIGINT
        if is_alone:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if is_first and os.environ.get("RANK", "0") == "0":
            hint = " Ctrl-C again ends it without a save." if is_alone else ""
            note = f"{self.signal_name} came: the run saves after this step and ends.{hint}\n"
            with suppress(OSError):
                os.write(2, note.encode())  # a buffered stream may be in use where the signal has struck

    def _leave_terminals(self) -> None:
        """What is printed from now on goes nowhere: writing to a terminal that was closed would be an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    @property
    def launcher_is_gone(self) -> bool:
        return self._launcher is not None and os.getppid() != self._launcher

    @property
    def reason(self) -> str:
        """Why to stop; empty where there is nothing. A signal counts before the launcher: it is somebody's will."""
        return self.signal_name or (LAUNCHER_GONE if self.launcher_is_gone else "")

    @property
    def asked(self) -> bool:
        return bool(self.reason)
