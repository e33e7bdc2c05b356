"""Joins the ranks of a run into torch's process group."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_med.launch.failure_report import FailureReport
from megatron_med.launch.rendezvous import meet


def start_process_group(
    timeout: timedelta, is_stopped: Callable[[], bool] = lambda: False
) -> tuple[torch.device, FailureReport]:
    """Joins the ranks that torchrun started, or makes a world of one.

    Args:
        timeout: how long ranks may take to come, and a collective to wait for one.
        is_stopped: whether to give up waiting for the others.

    Returns:
        This rank's device, and the means to tell who is silent when a collective fails.

    Raises:
        StoppedError: ``is_stopped``.
    """
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    store, rank, world_size = meet(timeout, is_stopped)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    return device, FailureReport(dist.PrefixStore("failure_report", store), rank, world_size)
