"""What the server of test ranks loads before it forks."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed.checkpoint
import torch.distributed.tensor

import megatron_med.train.loop  # noqa: F401

torch.set_num_threads(1)
