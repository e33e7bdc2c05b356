"""Before any connection is made, ranks that do not come are named; afterwards every group answers."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_med.config import ParallelConfig
from megatron_med.parallel.context import await_all_ranks, create_context, preflight
from tests.ranks import run_ranks


def test_missing_ranks_are_named() -> None:
    store = dist.HashStore()
    store.set("2", "here")
    with pytest.raises(RuntimeError, match=r"ranks \[1, 3\] of 4 did not start within 0:00:01"):
        await_all_ranks(store, 0, 4, timedelta(seconds=1))
    for rank in ("1", "3"):
        store.set(rank, "here")
    await_all_ranks(store, 0, 4, timedelta(seconds=1))


def _probe() -> bool:
    preflight(create_context(ParallelConfig(tensor=2, pipeline=2), torch.device("cpu")))
    return True


def test_every_group_answers() -> None:
    assert run_ranks(4, _probe) == [True] * 4
