"""Reads a Hugging Face folder straight into a stage of a model, one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_med.checkpoint.huggingface.checks import check_tensors
from megatron_med.checkpoint.huggingface.config import from_huggingface, read_config
from megatron_med.checkpoint.huggingface.files import open_tensors
from megatron_med.checkpoint.huggingface.mapping import tensor_maps
from megatron_med.checkpoint.load import refuse_not_finite
from megatron_med.checkpoint.quantized import refuse_not_quantisable
from megatron_med.config import ModelConfig
from megatron_med.config.schema import QuantizeConfig
from megatron_med.model.build import NOT_QUANTIZED, build_stage
from megatron_med.model.transformer import Transformer
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import parameters_with_layout
from megatron_med.parallel.tensor_parallel.quantized import quantized_weights


def is_huggingface(folder: Path) -> bool:
    """Whether a folder holds a model in Hugging Face's form."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def huggingface_model(folder: Path) -> ModelConfig:
    """The model in a folder."""
    return from_huggingface(read_config(folder))


@torch.no_grad()
def load_huggingface_stage(
    folder: Path,
    context: ParallelContext,
    dtype: torch.dtype,
    layers_per_stage: list[int] | None = None,
    quantize: QuantizeConfig = NOT_QUANTIZED,
) -> Transformer:
    """This rank's stage of the model in a folder; every rank reads the tensors of its layers.

    Args:
        folder: with ``config.json`` and safetensors.
        context: the grid.
        dtype: of the arithmetic.
        layers_per_stage: layers of each stage; None splits them by cost.
        quantize: what the matrices are quantised to while they are read.

    Raises:
        CheckpointError: a tensor is missing, too many, of another shape or not finite.
    """
    config = huggingface_model(folder)
    stage = build_stage(config, context, dtype, layers_per_stage, quantize)
    files, maps = open_tensors(folder), list(tensor_maps(config))
    check_tensors(files, maps, config, config.vocab_size)
    parameters = {layout.name: parameter for layout, parameter in parameters_with_layout(stage)}
    quantized = {weight.layout.name: weight for weight in quantized_weights(stage)}
    broken = []
    for tensor_map in maps:
        name = tensor_map.layout.name
        if name not in parameters and name not in quantized:
            continue
        whole = tensor_map.to_canonical(files.read, files.joint_dtype(tensor_map.hf_names))
        shard = tensor_map.layout.cut(whole, context.tp)
        if name in parameters:
            parameters[name].copy_(shard)
            continue
        quantized[name].fill(shard.to(device=context.device, dtype=dtype))
        if not quantized[name].is_finite():
            broken.append(name)
    refuse_not_quantisable(folder, broken, context)
    refuse_not_finite(folder, parameters.items(), context)
    return stage
