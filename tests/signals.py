"""Signals of what the tests start."""

from __future__ import annotations

import signal


def let_children_be_interrupted() -> None:
    """A shell ignores SIGINT in what it starts in the background, and so would everything that the tests start, for a
    shell cannot trap what it has inherited as ignored. A handler that does nothing is not handed down."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda _number, _frame: None)
