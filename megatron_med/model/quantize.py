"""Puts quantised weights into the place of a layer's matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from megatron_med.config import ModelConfig
from megatron_med.config.quantize import quantized_matrices
from megatron_med.config.schema import QuantizeConfig
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import ParameterLayout
from megatron_med.parallel.tensor_parallel.layers import ColumnParallelLinear, ParallelLinear
from megatron_med.parallel.tensor_parallel.quantized import Int8Weight, NF4Weight, QuantizedWeight, StoredMatrix

FinishLayer = Callable[[nn.Module, int], None]
"""What is done to each layer as soon as it is made; its global index."""


def keep_dense(layer: nn.Module, index: int) -> None:
    """Leaves the weights of a layer what they are."""


def quantizer(
    model: ModelConfig, context: ParallelContext, dtype: torch.dtype, quantize: QuantizeConfig
) -> FinishLayer:
    """Gives up a layer's matrices for quantised ones, which are still to be filled; norms and biases stay. A model that
    is made with it never holds more than one layer in 16 bit."""
    if quantize.base is None:
        return keep_dense

    def finish(layer: nn.Module, index: int) -> None:
        for path, parts in quantized_matrices(model).items():
            linear = layer.get_submodule(path)
            assert isinstance(linear, ParallelLinear), path
            layout = replace(linear.weight_layout, name=f"layers.{index}.{path}.weight", trained=False)
            linear.quantize(_quantized(linear, layout, parts, context, dtype, quantize))

    return finish


def _quantized(
    linear: ParallelLinear,
    layout: ParameterLayout,
    parts: list[str | None],
    context: ParallelContext,
    dtype: torch.dtype,
    quantize: QuantizeConfig,
) -> QuantizedWeight:
    if quantize.base == "int8":
        keeps_dense = quantize.outliers == "paper"
        return Int8Weight(layout, dtype, context, threshold=quantize.threshold, keeps_dense=keeps_dense)
    named = linear.parts if isinstance(linear, ColumnParallelLinear) else {}
    matrices = [StoredMatrix(tuple(named.values()) if part is None else (named[part],)) for part in parts]
    return NF4Weight(layout, dtype, context, matrices)
