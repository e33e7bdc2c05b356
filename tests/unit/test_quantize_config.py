"""Quantised bases that cannot be meant: one message each, which says what would work."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_med.config import Config, ModelConfig, ParallelConfig
from megatron_med.config.quantize import quantize_faults
from megatron_med.config.schema import DataConfig, LoRAConfig, QuantizeConfig, TrainConfig

LLAMA = {
    "family": "llama",
    "num_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "ffn_hidden_size": 704,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}
GPT2 = {name: value for name, value in LLAMA.items() if name != "ffn_hidden_size"} | {"family": "gpt2"}


def _faults(quantize: dict[str, Any], rank: int = 8, tensor: int = 1, model: dict[str, Any] | None = None) -> list[str]:
    config = Config(
        model=ModelConfig(**model or LLAMA),
        data=DataConfig(sequence_length=32),
        train=TrainConfig(global_batch_size=1, output_dir="RUN"),
        parallel=ParallelConfig(tensor=tensor),
        lora=LoRAConfig(rank=rank),
        quantize=QuantizeConfig(**quantize),
    )
    return list(quantize_faults(config))


@pytest.mark.parametrize(
    ("quantize", "options", "message"),
    [
        ({"base": "int8"}, {"rank": 0}, "cannot be trained. Train adapters beside them (lora.rank: 8)"),
        ({"base": "nf4"}, {"rank": 0}, "optimizer.name: adamw8bit saves memory when all weights are trained"),
        ({"threshold": 5.0}, {}, "quantize has settings, and quantize.base is null"),
        ({"base": "nf4", "threshold": 5.0}, {}, "these are of int8. Leave them out."),
        ({"base": "nf4", "outliers": "paper"}, {}, "these are of int8. Leave them out."),
        ({"base": "nf4"}, {"tensor": 2}, "mlp.down_proj would be cut inside a block of 64 weights"),
        ({"base": "nf4"}, {"tensor": 8, "model": GPT2}, "attn.c_proj would be cut inside a block of 64 weights"),
    ],
)
def test_faults(quantize: dict[str, Any], options: dict[str, Any], message: str) -> None:
    (fault,) = _faults(quantize, **options)
    assert message in fault


def test_sizes_that_would_do_are_told() -> None:
    (fault,) = _faults({"base": "nf4"}, tensor=8, model=GPT2)
    assert "These sizes of parallel.tensor would do: 1, 2, 4;" in fault
    assert not _faults({"base": "nf4"}, tensor=4, model=GPT2)
    assert not _faults({"base": "int8", "threshold": 3.0, "outliers": "paper"}, tensor=8)
    assert not _faults({}, rank=0)
