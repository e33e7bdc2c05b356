"""Makes this rank's stage of a model."""

from __future__ import annotations

import torch

from megatron_med.config import ModelConfig
from megatron_med.config.layers import stage_layers
from megatron_med.model.gpt2 import GPT2
from megatron_med.model.llama import Llama
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
    """This rank's stage, its weights not yet initialised."""
    layers = stage_layers(config, context.pp.size, layers_per_stage)[context.pp.rank]
    return FAMILIES[config.family](config, context, layers, dtype)
