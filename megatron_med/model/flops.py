"""Counts of parameters and floating-point operations, and how many of the latter an accelerator does."""

from __future__ import annotations

from megatron_med.config import ModelConfig
from megatron_med.config.layers import layer_cost

PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""Dense bf16 FLOP/s by the name of the accelerator, from NVIDIA's data sheets (SXM)."""


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model over the true, unpadded vocabulary; tied embeddings count once."""
    hidden = config.hidden_size
    layer = layer_cost(config)
    embeddings = config.vocab_size * hidden * (1 if config.tie_embeddings else 2)
    if config.family == "llama":
        return embeddings + config.num_layers * (layer + 2 * hidden) + hidden
    qkv_biases = (config.num_attention_heads + 2 * config.num_query_groups) * config.head_dim
    layer += 4 * hidden + qkv_biases + hidden + config.ffn_hidden_size + hidden
    return embeddings + config.max_position_embeddings * hidden + config.num_layers * layer + 2 * hidden


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of forward and backward per token, without recomputation.

    6 per weight of every matrix (lookup tables do no arithmetic), and 12 x heads x head_dim x keys for the two
    products of attention, a token seeing half of the sequence on average (Narayanan et al. 2021, causal).
    """
    matrices = config.num_layers * layer_cost(config) + config.vocab_size * config.hidden_size
    attention = config.num_layers * config.num_attention_heads * config.head_dim * sequence_length / 2
    return 6.0 * matrices + 12.0 * attention


def parameter_flops_per_token(config: ModelConfig) -> float:
    """6 per parameter, embedding included: the count that many papers divide by the peak (Kaplan et al. 2020)."""
    return 6.0 * parameter_count(config)


def hardware_flops_per_token(config: ModelConfig, sequence_length: int, recomputed_layers: int) -> float:
    """Floating-point operations that run, recomputation included, as Narayanan et al. 2021 (equation 3) count them:
    attention over all pairs of tokens, the true vocabulary.

    Args:
        config: the model.
        sequence_length: tokens of a sample.
        recomputed_layers: layers whose forward pass runs twice.
    """
    layer = 2.0 * layer_cost(config) + 4.0 * config.num_attention_heads * config.head_dim * sequence_length
    head = 2.0 * config.vocab_size * config.hidden_size
    return (3 * config.num_layers + recomputed_layers) * layer + 3 * head
