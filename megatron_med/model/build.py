"""Makes this rank's part of a model."""

from __future__ import annotations

import torch
from torch import nn

from megatron_med.config import ModelConfig, ParallelConfig
from megatron_med.config.layers import cut_into_chunks
from megatron_med.model.gpt2 import GPT2
from megatron_med.model.llama import Llama
from megatron_med.model.recompute import KEEP_ALL, Recompute
from megatron_med.model.transformer import Transformer
from megatron_med.parallel.context import ParallelContext

FAMILIES: dict[str, type[Transformer]] = {"llama": Llama, "gpt2": GPT2}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Arithmetic by the name that ``precision`` takes."""


def build_stage(
    config: ModelConfig,
    context: ParallelContext,
    dtype: torch.dtype,
    layers_per_stage: list[int] | None = None,
) -> Transformer:
    """This rank's stage as one chunk, its weights not yet initialised."""
    (chunk,) = cut_into_chunks(config, context.pp.size, 1, layers_per_stage)[context.pp.rank]
    return FAMILIES[config.family](config, context, chunk, dtype)


def build_chunks(
    config: ModelConfig,
    context: ParallelContext,
    dtype: torch.dtype,
    parallel: ParallelConfig,
    recompute: Recompute = KEEP_ALL,
) -> nn.ModuleList:
    """This rank's chunks, first to last, their weights not yet initialised."""
    cuts = cut_into_chunks(config, context.pp.size, parallel.virtual_stages, parallel.layers_per_stage)
    family = FAMILIES[config.family]
    return nn.ModuleList(family(config, context, chunk, dtype, recompute) for chunk in cuts[context.pp.rank])
