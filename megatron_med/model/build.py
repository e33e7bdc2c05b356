"""Makes this rank's part of a model."""

from __future__ import annotations

import torch
from torch import nn

from megatron_med.config import ModelConfig, ParallelConfig
from megatron_med.config.layers import cut_into_chunks
from megatron_med.config.schema import QuantizeConfig
from megatron_med.model.gpt2 import GPT2
from megatron_med.model.llama import Llama
from megatron_med.model.quantize import quantizer
from megatron_med.model.recompute import KEEP_ALL, Recompute
from megatron_med.model.transformer import Transformer
from megatron_med.parallel.context import ParallelContext

FAMILIES: dict[str, type[Transformer]] = {"llama": Llama, "gpt2": GPT2}

NOT_QUANTIZED = QuantizeConfig()

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Arithmetic by the name that ``precision`` takes."""


def build_stage(
    config: ModelConfig,
    context: ParallelContext,
    dtype: torch.dtype,
    layers_per_stage: list[int] | None = None,
    quantize: QuantizeConfig = NOT_QUANTIZED,
) -> Transformer:
    """This rank's stage as one chunk, its weights not yet initialised."""
    (chunk,) = cut_into_chunks(config, context.pp.size, 1, layers_per_stage)[context.pp.rank]
    finish = quantizer(config, context, dtype, quantize)
    return FAMILIES[config.family](config, context, chunk, dtype, finish_layer=finish)


def build_chunks(
    config: ModelConfig,
    context: ParallelContext,
    dtype: torch.dtype,
    parallel: ParallelConfig,
    recompute: Recompute = KEEP_ALL,
    quantize: QuantizeConfig = NOT_QUANTIZED,
) -> nn.ModuleList:
    """This rank's chunks, first to last, their weights not yet initialised."""
    cuts = cut_into_chunks(config, context.pp.size, parallel.virtual_stages, parallel.layers_per_stage)
    family = FAMILIES[config.family]
    finish = quantizer(config, context, dtype, quantize)
    return nn.ModuleList(family(config, context, chunk, dtype, recompute, finish) for chunk in cuts[context.pp.rank])
