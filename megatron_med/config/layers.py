"""How the layers of a model are cut over pipeline stages."""

from __future__ import annotations

from megatron_med.config.schema import ModelConfig


def layer_cost(model: ModelConfig) -> int:
    """Weights of one transformer layer's matrices: the multiply-adds it does per token."""
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_query_groups * model.head_dim
    attention = model.hidden_size * (2 * queries + 2 * keys)
    matrices = 3 if model.family == "llama" else 2
    return attention + matrices * model.hidden_size * model.ffn_hidden_size


def head_cost(model: ModelConfig) -> int:
    """Multiply-adds per token of the output head."""
    return model.padded_vocab_size * model.hidden_size


def split_layers(model: ModelConfig, stages: int) -> list[int]:
    """Number of layers of each stage, so that the dearest stage is as cheap as possible.

    The head weighs its matrix product on the last stage. The embedding is a lookup without arithmetic; its
    weight in memory is counted as a tenth of the head's cost on the first stage, which settles ties.
    Every stage gets at least one layer.
    """
    cost = [0.0] * stages
    cost[0] += 0.1 * head_cost(model)
    cost[-1] += head_cost(model)
    counts = [1] * stages
    for _ in range(model.num_layers - stages):
        cheapest = min(range(stages), key=lambda stage: cost[stage] + counts[stage] * layer_cost(model))
        counts[cheapest] += 1
    return counts


def stage_layers(model: ModelConfig, stages: int, layers_per_stage: list[int] | None) -> list[range]:
    """Global layer indices of each stage, first to last."""
    counts = layers_per_stage or split_layers(model, stages)
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
