"""Counts of parameters and floating-point operations, and how many of the latter an accelerator does."""

from __future__ import annotations

from megatron_med.config import ModelConfig
from megatron_med.config.layers import layer_cost
from megatron_med.config.lora import trained_by_lora
from megatron_med.config.schema import MULTIPLE_CHOICE, LoRAConfig

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
    embeddings = config.vocab_size * hidden + (0 if config.tie_embeddings else config.head_weights)
    embeddings += config.num_labels if config.head == MULTIPLE_CHOICE else 0  # its bias
    if config.family == "llama":
        return embeddings + config.num_layers * (layer + 2 * hidden) + hidden
    qkv_biases = (config.num_attention_heads + 2 * config.num_query_groups) * config.head_dim
    layer += 4 * hidden + qkv_biases + hidden + config.ffn_hidden_size + hidden
    return embeddings + config.max_position_embeddings * hidden + config.num_layers * layer + 2 * hidden


def training_flops_per_token(config: ModelConfig, sequence_length: int, lora: LoRAConfig | None = None) -> float:
    """Floating-point operations of forward and backward per token, without recomputation.

    6 per weight of every matrix (lookup tables do no arithmetic), 4 where it is frozen and has no gradient, and 12 x
    heads x head_dim x keys for the two products of attention, a token seeing half of the sequence on average (Narayanan
    et al. 2021, causal).
    """
    matrices = config.num_layers * layer_cost(config) + config.head_weights
    attention = config.num_layers * config.num_attention_heads * config.head_dim * sequence_length / 2
    return _per_weight(lora) * matrices + 12.0 * attention + _adapter_flops(config, lora)


def parameter_flops_per_token(config: ModelConfig, lora: LoRAConfig | None = None) -> float:
    """6 per parameter, embedding included: the count that many papers divide by the peak (Kaplan et al. 2020). 4 where
    it is frozen."""
    return _per_weight(lora) * parameter_count(config) + _adapter_flops(config, lora)


def hardware_flops_per_token(
    config: ModelConfig, sequence_length: int, recomputed_layers: int, lora: LoRAConfig | None = None
) -> float:
    """Floating-point operations that run, recomputation included, as Narayanan et al. 2021 (equation 3) count them:
    attention over all pairs of tokens, the true vocabulary.

    Args:
        config: the model.
        sequence_length: tokens of a sample.
        recomputed_layers: layers whose forward pass runs twice.
        lora: adapters beside frozen weights.
    """
    products, attention = 2.0 * layer_cost(config), 4.0 * config.num_attention_heads * config.head_dim * sequence_length
    head = 2.0 * config.head_weights
    passes = _per_weight(lora) / 2
    layers = (passes * config.num_layers + recomputed_layers) * products
    return (
        layers + (3 * config.num_layers + recomputed_layers) * attention + passes * head + _adapter_flops(config, lora)
    )


def _per_weight(lora: LoRAConfig | None) -> float:
    """Two each for the product, the gradient of its input, and the gradient of a weight that is trained."""
    return 4.0 if lora is not None and lora.rank else 6.0


def _adapter_flops(config: ModelConfig, lora: LoRAConfig | None) -> float:
    return 6.0 * trained_by_lora(config, lora) if lora is not None and lora.rank else 0.0
