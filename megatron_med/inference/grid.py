"""The ranks that read one model, and their replicas."""

from __future__ import annotations

from datetime import timedelta

import torch

from megatron_med.config import ParallelConfig
from megatron_med.errors import ConfigError
from megatron_med.launch.environment import read_ranks
from megatron_med.launch.process_group import start_process_group
from megatron_med.parallel.context import ParallelContext, create_context, single_process_context


def join_grid(tensor: int, pipeline: int, *, replicas: bool, timeout: timedelta) -> ParallelContext:
    """Joins the ranks that torchrun has started, without sequence parallelism; the caller ends the process group.

    Args:
        tensor, pipeline: ranks that the model is cut over.
        replicas: whether there may be several copies of it.
        timeout: how long a rank may wait for another.

    Raises:
        ConfigError: there are other ranks than are needed.
    """
    if min(tensor, pipeline) < 1:
        raise ConfigError(f"--tensor is {tensor} and --pipeline {pipeline}: both must be at least 1.")
    _, world_size = read_ranks()
    needed = tensor * pipeline
    if world_size % needed or (world_size != needed and not replicas):
        other = f", or cut the model over {world_size} ranks: --tensor {world_size}" if world_size > 1 else ""
        raise ConfigError(
            f"The world size is {world_size}: --tensor x --pipeline = {tensor} x {pipeline} ranks are needed"
            f"{', or a multiple of that' if replicas else ''}. Start with --nproc-per-node {needed}{other}."
        )
    if world_size == 1:
        return single_process_context(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device, _ = start_process_group(timeout)
    return create_context(ParallelConfig(tensor=tensor, pipeline=pipeline, sequence_parallel=False), device)
