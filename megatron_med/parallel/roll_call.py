"""Who is silent after a collective has failed: a rank that hangs, or one that has died."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

_POLL_SECONDS = 0.1


class RollCall:
    """Every rank whose collective fails answers in the rendezvous store; those that do not are the cause.

    Args:
        store: of the rendezvous; it outlives the connections between ranks.
        rank, world_size: of this process.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size

    def silent_ranks(self, patience: timedelta, is_hurried: Callable[[], bool] = lambda: False) -> list[int]:
        """Answers, and waits until only ranks that stay silent are missing.

        Args:
            patience: how long the others may take to notice.
            is_hurried: asked again and again; a tenth of the patience must do once it is true.

        Returns:
            Ranks without an answer, as far as the store can still be asked.
        """
        silent: list[int] = []
        asking = threading.Thread(target=self._ask, args=(silent, patience, is_hurried), daemon=True)
        asking.start()
        asking.join(2 * patience.total_seconds())  # a store behind a cut link does not even time out
        return list(silent)

    def _ask(self, silent: list[int], patience: timedelta, is_hurried: Callable[[], bool]) -> None:
        with suppress(RuntimeError, OSError):  # the store goes with the launcher
            self._store.set(str(self._rank), "here")
            start = time.monotonic()
            while True:
                silent[:] = [rank for rank in range(self._world_size) if not self._store.check([str(rank)])]
                limit = patience.total_seconds() * (0.1 if is_hurried() else 1)
                if not silent or time.monotonic() - start > limit:
                    break
                time.sleep(_POLL_SECONDS)

    def speaks(self, silent: list[int]) -> bool:
        """Whether this rank is the one to tell: the first that answered."""
        return self._rank == min(set(range(self._world_size)) - set(silent), default=self._rank)
