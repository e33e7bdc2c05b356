"""How ranks find each other before any connection is made, and who is missing when they do not."""

from __future__ import annotations

import os
import time
import uuid
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_LOOK_AGAIN = timedelta(seconds=0.5)


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Joins the ranks that the environment tells of (``RANK``, ``WORLD_SIZE``, ...), or makes a world of one.

    Returns:
        A store of this start alone, this rank, and the number of ranks.

    Raises:
        RuntimeError: names the ranks that did not come in time.
    """
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _open_store(rank, world_size, timeout)
    start = agree_on_start(store, rank, world_size, timeout)
    return dist.PrefixStore(start, store), rank, world_size


def _open_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """torchrun's store, or one that rank 0 opens. The latter must not wait for everybody: it could not say for whom."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        return store
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return dist.TCPStore(host, port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise RuntimeError(f"rank 0 did not answer at {host}:{port} within {timeout}") from error


def agree_on_start(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Waits until every rank has come, and returns a name for this start that none before it had.

    torchrun keeps one store over all of its restarts, so whatever a killed start has written is still there. Rank 0
    therefore invents a name and every other rank answers it with one of its own: an answer to a new name, and an
    acknowledgement of a new answer, cannot be left over.

    Raises:
        RuntimeError: names the ranks that did not come in time.
    """
    if rank == 0:
        return _gather_answers(store, world_size, timeout)
    own = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    start = None
    while time.monotonic() < deadline:
        with suppress(RuntimeError):  # not there yet, or left over from a start that is no more: look again
            store.wait(["start"], _LOOK_AGAIN)
            start = store.get("start").decode()
            store.set(f"{start}/answer/{rank}", own)
            store.wait([f"{start}/go/{own}"], _LOOK_AGAIN)
            return start
    missing = [0] if start is None else _missing(store, start, world_size) or [0]
    raise RuntimeError(_describe(missing, world_size, timeout))


def _gather_answers(store: dist.Store, world_size: int, timeout: timedelta) -> str:
    start = uuid.uuid4().hex
    store.set("start", start)
    store.set(f"{start}/answer/0", "")
    try:
        store.wait([f"{start}/answer/{other}" for other in range(world_size)], timeout)
    except RuntimeError as error:  # its own message is a list of keys
        raise RuntimeError(_describe(_missing(store, start, world_size), world_size, timeout)) from error
    for other in range(1, world_size):
        answer = store.get(f"{start}/answer/{other}").decode()
        store.set(f"{start}/go/{answer}", "")
    return start


def _missing(store: dist.Store, start: str, world_size: int) -> list[int]:
    return [other for other in range(world_size) if not store.check([f"{start}/answer/{other}"])]


def _describe(missing: list[int], world_size: int, timeout: timedelta) -> str:
    return f"ranks {missing} of {world_size} did not start within {timeout}"
