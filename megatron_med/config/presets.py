"""Named model shapes. Figures from the model cards and ``config.json`` of each model."""

from __future__ import annotations

from typing import Any

_LLAMA2: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "norm_eps": 1.0e-5,
    "rope_theta": 10000.0,
}

_GPT2: dict[str, Any] = {"family": "gpt2", "norm_eps": 1.0e-5, "max_position_embeddings": 1024}

PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b": _LLAMA2 | {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 11008},
    "llama2-13b": _LLAMA2
    | {"num_layers": 40, "hidden_size": 5120, "num_attention_heads": 40, "ffn_hidden_size": 13824},
    "llama2-70b": _LLAMA2
    | {
        "num_layers": 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_query_groups": 8,
        "ffn_hidden_size": 28672,
    },
    "biomedlm-2.7b": _GPT2
    | {
        "num_layers": 32,
        "hidden_size": 2560,
        "num_attention_heads": 20,
        "ffn_hidden_size": 10240,
        "vocab_size": 28896,
    },
    "gpt2-124m": _GPT2
    | {
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "ffn_hidden_size": 3072,
        "vocab_size": 50257,
    },
    "llama-134m": _LLAMA2
    | {
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "ffn_hidden_size": 2048,
        "max_position_embeddings": 1024,
    },
    "llama-58m": _LLAMA2
    | {
        "num_layers": 8,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "ffn_hidden_size": 1376,
        "max_position_embeddings": 1024,
    },
    "llama-10m": _LLAMA2
    | {
        "num_layers": 8,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 704,
        "vocab_size": 8192,
        "max_position_embeddings": 512,
    },
    "llama-tiny": _LLAMA2
    | {
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 352,
        "vocab_size": 2048,
        "max_position_embeddings": 256,
    },
    "gpt2-tiny": _GPT2
    | {
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 8,
        "vocab_size": 2048,
        "max_position_embeddings": 256,
    },
}
