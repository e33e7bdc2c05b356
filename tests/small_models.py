"""Small random models in Hugging Face folders, with a tokenizer."""

from __future__ import annotations

from pathlib import Path

from megatron_med.tokenizer import load_tokenizer


def write_small_llama(folder: Path, tokenizer: Path, seed: int, **shape: float) -> Path:
    """A Llama of two layers whose logits lie apart; ``shape`` changes its configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }
    LlamaForCausalLM(LlamaConfig(**settings | shape)).save_pretrained(folder)
    load_tokenizer(tokenizer).copy_to(folder)
    return folder
