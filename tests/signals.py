"""Signals of what the tests start."""

from __future__ import annotations

import signal


def let_children_be_interrupted() -> None:
    """A shell ignores SIGINT in what it starts in the background, nohup ignores SIGHUP, and so would everything that
    the tests start, for what was inherited as ignored stays so. A handler that does nothing is not handed down."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: None)
