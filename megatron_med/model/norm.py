"""Normalisation layers. Under sequence parallelism each rank normalises its part of the sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_med.config import ModelConfig
from megatron_med.kernels import functional as kernels
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import make_parameter
from megatron_med.parallel.tensor_parallel.layers import replicated_layout


class RMSNorm(nn.Module):
    """``[seq(/tp), batch, hidden]`` -> the same shape (Zhang and Sennrich 2019)."""

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = config.norm_eps
        layout = replicated_layout((config.hidden_size,), "ones", context)
        self.weight = make_parameter(layout, context, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """``[seq(/tp), batch, hidden]`` -> the same shape (Ba et al. 2016)."""

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = config.norm_eps
        shape = (config.hidden_size,)
        self.weight = make_parameter(replicated_layout(shape, "ones", context), context, dtype)
        self.bias = make_parameter(replicated_layout(shape, "zeros", context), context, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)
