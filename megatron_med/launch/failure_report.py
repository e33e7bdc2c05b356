"""Why a collective has failed: a rank that tells its own fault, one that hangs, or one that has died."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

_POLL_SECONDS = 0.1
_WORDS = ("gloo", "Gloo", "NCCL", "c10d", "pair closure")
"""In the messages of collectives that fail; the last one where another collective of the group has timed out first."""
_STORE_PATIENCE = timedelta(seconds=2)


@dataclass(frozen=True)
class Cause:
    """What ended the run: the first rank's own fault.

    Attributes:
        rank: whose.
        code: exit code.
        reason: in words.
    """

    rank: int
    code: int
    reason: str


def is_connection_failure(error: BaseException) -> bool:
    """Whether an error only says that other ranks are gone or late: gloo raises plain RuntimeErrors."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (dist.DistError, CheckpointException)):
            return True
        if type(seen) is RuntimeError and any(word in str(seen) for word in _WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


class FailureReport:
    """Every rank whose collective fails answers in the rendezvous store; those that do not are the cause. A rank that
    fails by itself says so there and leaves.

    Args:
        store: of the rendezvous; it outlives the connections between ranks.
        rank, world_size: of this process.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size

    def record(self, code: int, reason: str) -> None:
        """Tells the others that this rank ends the run, and why; the first one counts."""
        cause = json.dumps({"rank": self._rank, "code": code, "reason": reason})
        self._in_time(lambda: self._store.compare_set("cause", "", cause))

    def cause(self) -> Cause | None:
        """What the first rank that failed by itself has told."""
        found: list[Cause] = []
        self._in_time(lambda: found.append(Cause(**json.loads(self._store.get("cause")))) if self._told() else None)
        return found[0] if found else None

    def _told(self) -> bool:
        return self._store.check(["cause"])

    def mark_recorded(self) -> None:
        """Rank 0 has written and printed what there is to say."""
        self._in_time(lambda: self._store.set("recorded", "yes"))

    def await_record(self, patience: timedelta) -> bool:
        """Waits for ``mark_recorded``, as the ranks do that fail together with rank 0."""
        recorded: list[bool] = []

        def wait() -> None:
            with suppress(dist.DistNetworkError):  # the store may go with rank 0, which speaks before it leaves
                self._store.wait(["recorded"], patience)
            recorded.append(True)

        self._in_time(wait, patience)
        return bool(recorded)

    def _in_time(self, action: Callable[[], object], patience: timedelta = _STORE_PATIENCE) -> None:
        """Runs an action on the store in a thread: behind a cut link it would not even time out."""

        def run() -> None:
            with suppress(RuntimeError, OSError, ValueError):  # the store goes with the launcher
                action()

        asking = threading.Thread(target=run, daemon=True)
        asking.start()
        asking.join(2 * patience.total_seconds())

    def silent_ranks(self, patience: timedelta, is_hurried: Callable[[], bool] = lambda: False) -> list[int]:
        """Answers, and waits until only ranks that stay silent are missing.

        Args:
            patience: how long the others may take to notice.
            is_hurried: asked again and again; a tenth of the patience must do once it is true.

        Returns:
            Ranks without an answer, as far as the store can still be asked.
        """
        silent: list[int] = []
        self._in_time(lambda: self._ask(silent, patience, is_hurried), patience)
        return list(silent)

    def _ask(self, silent: list[int], patience: timedelta, is_hurried: Callable[[], bool]) -> None:
        self._store.set(str(self._rank), "here")
        start = time.monotonic()
        while True:
            silent[:] = [rank for rank in range(self._world_size) if not self._store.check([str(rank)])]
            limit = patience.total_seconds() * (0.1 if is_hurried() else 1)
            if not silent or self._told() or time.monotonic() - start > limit:
                break
            time.sleep(_POLL_SECONDS)

    def is_reporter(self, silent: list[int]) -> bool:
        """Whether this rank is the one to tell: the first that answered."""
        return self._rank == min(set(range(self._world_size)) - set(silent), default=self._rank)
