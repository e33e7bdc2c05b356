"""One rank of a world that is not there: for the dry run and the planner, never for a real run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


def start_fake_process_group(rank: int, world_size: int) -> torch.device:
    """Makes this process one rank of a world of which no other rank exists: torch's fake backend, whose collectives
    move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    return torch.device("cpu")
