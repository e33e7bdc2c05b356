"""Models of random numbers, large enough that memory shows."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig


def write_llama(config: LlamaConfig, folder: Path) -> None:
    """A Hugging Face folder in bf16, made without the model."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    layer = {f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
    layer |= {f"self_attn.{name}_proj.weight": (keys, hidden) for name in "kv"}
    layer |= {"mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden)}
    layer |= {"mlp.down_proj.weight": (hidden, ffn), "input_layernorm.weight": (hidden,)}
    layer |= {"post_attention_layernorm.weight": (hidden,)}
    shapes = {
        f"model.layers.{i}.{name}": shape for i in range(config.num_hidden_layers) for name, shape in layer.items()
    }
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (config.vocab_size, hidden))
    shapes["model.norm.weight"] = (hidden,)
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-1, 1) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
