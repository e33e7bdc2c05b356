"""Puts adapters beside the weights of a model, and takes the weights out of training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import nn

from megatron_med.config import ModelConfig
from megatron_med.config.lora import targets_of
from megatron_med.config.schema import LoRAConfig
from megatron_med.model.transformer import Transformer
from megatron_med.parallel.parameters import freeze, name_parameters
from megatron_med.parallel.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, head_rows
from megatron_med.parallel.tensor_parallel.lora import LoRASettings


def add_adapters(
    chunks: Iterable[nn.Module], model: ModelConfig, lora: LoRAConfig, new_rows: range | None = None
) -> None:
    """Freezes every parameter of these chunks and adds the adapters that ``lora`` asks for; none with rank 0.

    Args:
        chunks: of a model.
        model: its configuration.
        lora: settings of the adapters.
        new_rows: tokens whose rows are trained with ``lora.train_rows``; None: there are none.
    """
    if not lora.rank:
        return
    settings = LoRASettings(lora.rank, lora.scale, lora.dropout, lora.lr_scale_b)
    by_linear: dict[str, dict[str, str | None]] = {}
    for target in targets_of(model, lora):
        by_linear.setdefault(target.linear, {})[target.name] = target.part
    for chunk in cast(Iterable[Transformer], chunks):
        for parameter in chunk.parameters():
            freeze(parameter)
        for index, layer in zip(chunk.chunk.layers, chunk.layers, strict=True):
            for path, targets in by_linear.items():
                linear = cast(ColumnParallelLinear | RowParallelLinear, layer.get_submodule(path))
                linear.add_lora(targets, settings, f"layers.{index}.{path}.lora")
        if lora.train_rows is not None and new_rows is not None:
            _train_rows(chunk, new_rows)
        name_parameters(chunk, chunk.chunk.layers)


def _train_rows(chunk: Transformer, tokens: range) -> None:
    ends, tied = chunk.chunk, bool(chunk.config.tie_embeddings)
    if ends.is_first or (tied and ends.is_last):
        chunk.embedding.word.train_rows(tokens)
    if ends.is_last:
        chunk.head.new_rows = head_rows(chunk.head, tokens, chunk.embedding.word if tied else None)
