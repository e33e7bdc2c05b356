"""Before any connection is made, ranks that do not come are named; afterwards every group answers."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_med.config import ParallelConfig
from megatron_med.launch.preflight import preflight
from megatron_med.launch.rendezvous import StoppedError, agree_on_start
from megatron_med.parallel.context import create_context
from tests.ranks import run_ranks


def _meet(store: dist.Store, ranks: range, world_size: int, seconds: float = 20) -> dict[int, str]:
    """What each rank hears, in threads."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        timeout = timedelta(seconds=seconds)
        futures = {rank: pool.submit(agree_on_start, store, rank, world_size, timeout) for rank in ranks}
    heard = {}
    for rank, future in futures.items():
        error = future.exception()
        heard[rank] = str(error) if error else future.result()
    return heard


def test_missing_ranks_are_named() -> None:
    for ranks in (range(2), range(1, 2)):
        heard = _meet(dist.HashStore(), ranks, 4, 1.5)
        missing = [rank for rank in range(4) if rank not in ranks]
        expected = missing if 0 in ranks else [0]
        assert heard[1] == f"ranks {expected} of 4 did not start within 0:00:01.500000"


def test_a_restart_takes_nothing_from_the_start_before() -> None:
    """torchrun keeps its store: answers, acknowledgements and the name of a killed start are still in it."""
    store = dist.HashStore()
    first = _meet(store, range(4), 4)
    again = _meet(store, range(4), 4)
    assert len(set(first.values())) == len(set(again.values())) == 1
    assert first[0] != again[0]
    assert _meet(store, range(1, 4), 4, 1.5)[2] == "ranks [0] of 4 did not start within 0:00:01.500000"
    heard = _meet(store, range(3), 4, 1.5)
    assert heard[0] == heard[1] == "ranks [3] of 4 did not start within 0:00:01.500000"


def test_a_start_that_was_called_off_does_not_end_the_next_one() -> None:
    """The name of the old start is still there when the ranks of the new one look for it."""
    store = dist.HashStore()
    timeout = timedelta(seconds=20)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(agree_on_start, store, 1, 3, timeout)
        asked = time.monotonic() + 1
        leaving = pool.submit(agree_on_start, store, 0, 3, timeout, lambda: time.monotonic() > asked)
        assert all(isinstance(future.exception(), StoppedError) for future in (leaving, waiting))
        later = pool.submit(agree_on_start, store, 1, 2, timeout)
        time.sleep(1.2)
        assert agree_on_start(store, 0, 2, timeout) == later.result()


def _probe() -> bool:
    for chunks in (1, 2):
        context = create_context(ParallelConfig(tensor=2, pipeline=3, virtual_stages=chunks), torch.device("cpu"))
        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            preflight(context)
        asked = {call.kwargs["group"] for call in reduced.call_args_list}
        assert asked == {axis.group for axis in context.axes().values()} - {None}
    return True


def test_every_group_answers() -> None:
    assert run_ranks(6, _probe) == [True] * 6
