"""Feed-forward layers: gated (SwiGLU) and plain (GELU), the inner width cut over tensor-parallel ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron_med.config import ModelConfig
from megatron_med.kernels import functional as kernels
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import RowBlocks
from megatron_med.parallel.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


def gate_up_parts(config: ModelConfig) -> dict[str, RowBlocks]:
    """Rows of gate and up in the joint weight ``[2, ffn, hidden]`` seen as ``[2 * ffn, hidden]``."""
    width = config.ffn_hidden_size
    return {"gate": RowBlocks(0, width, 2 * width), "up": RowBlocks(width, width, 2 * width)}


def _down(config: ModelConfig, context: ParallelContext, dtype: torch.dtype, bias: bool) -> RowParallelLinear:
    return RowParallelLinear(
        (config.hidden_size, config.ffn_hidden_size),
        context,
        dtype,
        bias=bias,
        init_std=config.init_std / math.sqrt(2 * config.num_layers),
    )


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), ``[seq(/tp), batch, hidden]`` -> the same shape (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = ColumnParallelLinear(
            (2, config.ffn_hidden_size, config.hidden_size),
            context,
            dtype,
            bias=False,
            init_std=config.init_std,
            parts=gate_up_parts(config),
        )
        self.down = _down(config, context, dtype, bias=False)

    def forward(self, x: Tensor, dropout_key: str = "") -> Tensor:
        return self.down(kernels.swiglu(self.gate_up(x, dropout_key)), dropout_key)


class MLP(nn.Module):
    """down(gelu(up(x))), with biases, ``[seq(/tp), batch, hidden]`` -> the same shape."""

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(
            (config.ffn_hidden_size, config.hidden_size),
            context,
            dtype,
            bias=True,
            init_std=config.init_std,
        )
        self.down = _down(config, context, dtype, bias=True)

    def forward(self, x: Tensor, dropout_key: str = "") -> Tensor:
        return self.down(kernels.gelu_tanh(self.up(x, dropout_key)), dropout_key)
