"""What a quantised base asks of a configuration, and which matrices are quantised."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_med.config.lora import LORA_TARGETS
from megatron_med.config.schema import Config, ModelConfig, QuantizeConfig

NF4_BLOCK = 64
"""Weights that share a maximum."""


def quantized_matrices(model: ModelConfig) -> dict[str, list[str | None]]:
    """The linears of a layer whose weights are quantised: all of them. For each the named parts that are tensors of
    their own in Hugging Face's files; None: the whole weight is one."""
    linears: dict[str, list[str | None]] = {}
    for target in LORA_TARGETS[model.family]:
        linears.setdefault(target.linear, []).append(target.part)
    return linears


def quantize_named(name: str) -> QuantizeConfig:
    """The default settings of ``int8`` or ``nf4``; of ``none`` no quantisation."""
    return QuantizeConfig(base=None if name == "none" else name)  # type: ignore[arg-type]


def quantize_faults(config: Config) -> Iterator[str]:
    """Settings of a quantised base that cannot be meant."""
    quantize = config.quantize
    if quantize.base is None:
        if quantize != QuantizeConfig():
            yield "quantize has settings, and quantize.base is null: set it to int8, or leave the section out."
        return
    if not config.lora.rank:
        yield (
            f"quantize.base is {quantize.base}, and lora.rank 0: quantised weights cannot be trained. Train adapters "
            "beside them (lora.rank: 8), or leave quantize.base out; optimizer.name: adamw8bit saves memory when all "
            "weights are trained."
        )
    yield from _int8_faults(quantize)
    yield from nf4_faults(config.model, config.parallel.tensor, quantize)


def _int8_faults(quantize: QuantizeConfig) -> Iterator[str]:
    default = QuantizeConfig()
    if quantize.base != "int8" and (quantize.threshold, quantize.outliers) != (default.threshold, default.outliers):
        yield (
            f"quantize.base is {quantize.base}, and quantize.threshold or outliers is given: these are of int8. Leave "
            "them out."
        )


def nf4_faults(model: ModelConfig, tensor: int, quantize: QuantizeConfig) -> Iterator[str]:
    """Whether tensor parallelism would cut a block of 64 weights."""
    if quantize.base != "nf4" or not _cuts_block(model, tensor):
        return
    matrix = _cuts_block(model, tensor)
    possible = [size for size in range(1, 129) if _divides(model, size) and not _cuts_block(model, size)]
    yield (
        f"quantize.base is nf4 and parallel.tensor {tensor}: {matrix} would be cut inside a block of {NF4_BLOCK} "
        f"weights. These sizes of parallel.tensor would do: {', '.join(map(str, possible))}; or take int8."
    )


def _divides(model: ModelConfig, tensor: int) -> bool:
    cut = (model.num_query_groups, model.num_attention_heads, model.ffn_hidden_size, model.padded_vocab_size)
    return math.gcd(*cut) % tensor == 0


def _cuts_block(model: ModelConfig, tensor: int) -> str | None:
    """Name of the first matrix of a layer in which a cut falls into a block."""
    if tensor == 1:
        return None
    for target in LORA_TARGETS[model.family]:
        rows, width = target.shape(model)
        if target.linear in ("attention.output", "mlp.down"):
            bad = width % NF4_BLOCK or width // tensor % NF4_BLOCK
        else:
            parts = 3 if model.family == "gpt2" and target.linear == "attention.qkv" else 1
            bad = rows // parts * width % NF4_BLOCK or rows // parts // tensor * width % NF4_BLOCK
        if bad:
            return target.module
    return None
