"""How ranks find each other before any connection is made, and who is missing when they do not."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_med.launch.environment import read_master, read_ranks

_LOOK_AGAIN = timedelta(seconds=0.5)
_ATTEMPT = timedelta(seconds=3)


class StoppedError(Exception):
    """Somebody has asked for an end before all ranks had come."""


def meet(timeout: timedelta, is_stopped: Callable[[], bool]) -> tuple[dist.Store, int, int]:
    """Joins the ranks that the environment tells of (``RANK``, ``WORLD_SIZE``, ...), or makes a world of one.

    Args:
        timeout: how long ranks may take to come.
        is_stopped: asked again and again; the wait ends where it is true on any rank.

    Returns:
        A store of this start alone, this rank, and the number of ranks.

    Raises:
        RuntimeError: names the ranks that did not come in time.
        ConfigError: the environment tells of no rank.
        StoppedError: ``is_stopped``.
    """
    rank, world_size = read_ranks()
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    store = _open_store(rank, world_size, timeout, is_stopped)
    start = agree_on_start(store, rank, world_size, timeout, is_stopped)
    return dist.PrefixStore(start, store), rank, world_size


def _open_store(rank: int, world_size: int, timeout: timedelta, is_stopped: Callable[[], bool]) -> dist.Store:
    """torchrun's store, or one that rank 0 opens. The latter must not wait for everybody: it could not say for whom."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        return store
    host, port = read_master()
    if rank == 0:
        return dist.TCPStore(host, port, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
    deadline = time.monotonic() + timeout.total_seconds()
    while True:  # a signal is seen between two attempts, not within one
        try:
            store = dist.TCPStore(host, port, world_size, timeout=min(timeout, _ATTEMPT), wait_for_workers=False)
            store.set_timeout(timeout)
            return store
        except RuntimeError as error:
            if is_stopped():
                raise StoppedError from error
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank 0 did not answer at {host}:{port} within {timeout}") from error


def agree_on_start(
    store: dist.Store, rank: int, world_size: int, timeout: timedelta, is_stopped: Callable[[], bool] = lambda: False
) -> str:
    """Waits until every rank has come, and returns a name for this start that none before it had.

    torchrun keeps one store over all of its restarts, so whatever a killed start has written is still there. Rank 0
    therefore invents a name and every other rank answers it with one of its own: an answer to a new name, and an
    acknowledgement of a new answer, cannot be left over.

    Raises:
        RuntimeError: names the ranks that did not come in time.
        StoppedError: ``is_stopped`` here or on rank 0.
    """
    if rank == 0:
        return _gather_answers(store, world_size, timeout, is_stopped)
    own = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    start = None
    while time.monotonic() < deadline:
        try:
            store.wait(["start"], _LOOK_AGAIN)
            start = store.get("start").decode()
            store.set(f"{start}/answer/{rank}", own)
            store.wait([f"{start}/go/{own}"], _LOOK_AGAIN)
            return start
        except dist.DistNetworkError as error:
            raise RuntimeError("the launcher or rank 0 has ended before all ranks had come") from error
        except RuntimeError:  # not there yet, or left over from a start that is no more: look again
            if is_stopped() or (start is not None and store.check([f"{start}/off/{own}"])):
                raise StoppedError from None
    missing = [0] if start is None else _missing(store, start, world_size) or [0]
    raise RuntimeError(_describe(missing, world_size, timeout))


def _gather_answers(store: dist.Store, world_size: int, timeout: timedelta, is_stopped: Callable[[], bool]) -> str:
    start = uuid.uuid4().hex
    store.set("start", start)
    store.set(f"{start}/answer/0", "")
    answers = [f"{start}/answer/{other}" for other in range(world_size)]
    deadline = time.monotonic() + timeout.total_seconds()
    while not store.check(answers):
        if is_stopped():
            for answer in answers[1:]:  # by the name a rank has given itself: nothing may be left for a later start
                if store.check([answer]):
                    store.set(f"{start}/off/{store.get(answer).decode()}", "")
            time.sleep(2 * _LOOK_AGAIN.total_seconds())  # the store may go with this process: let the others see it
            raise StoppedError
        if time.monotonic() > deadline:
            raise RuntimeError(_describe(_missing(store, start, world_size), world_size, timeout))
        with suppress(RuntimeError):  # its own message is a list of keys
            store.wait(answers, _LOOK_AGAIN)
    for answer in answers[1:]:
        store.set(f"{start}/go/{store.get(answer).decode()}", "")
    return start


def _missing(store: dist.Store, start: str, world_size: int) -> list[int]:
    return [other for other in range(world_size) if not store.check([f"{start}/answer/{other}"])]


def _describe(missing: list[int], world_size: int, timeout: timedelta) -> str:
    return f"ranks {missing} of {world_size} did not start within {timeout}"
