"""How the layers of a model are cut over pipeline stages."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_med.config.schema import LANGUAGE_MODEL, ModelConfig


def layer_cost(model: ModelConfig) -> int:
    """Weights of one transformer layer's matrices: the multiply-adds it does per token."""
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_query_groups * model.head_dim
    attention = model.hidden_size * (2 * queries + 2 * keys)
    matrices = 3 if model.family == "llama" else 2
    return attention + matrices * model.hidden_size * model.ffn_hidden_size


def head_cost(model: ModelConfig) -> int:
    """Multiply-adds per token of the output head."""
    return model.padded_vocab_size * model.hidden_size if model.head == LANGUAGE_MODEL else model.head_weights


def split_layers(model: ModelConfig, stages: int) -> list[int]:
    """Number of layers of each stage, so that the costliest stage costs as little as possible.

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


@dataclass(frozen=True)
class Chunk:
    """A run of layers that is computed without leaving a stage.

    Attributes:
        layers: global indices.
        is_first, is_last: whether it begins with the embedding and ends with the head.
    """

    layers: range
    is_first: bool = True
    is_last: bool = True


def cut_into_chunks(
    model: ModelConfig, stages: int, virtual_stages: int = 1, layers_per_stage: list[int] | None = None
) -> list[list[Chunk]]:
    """The chunks of each stage. Chunk c of stage s is virtual stage ``c * stages + s`` of the model.

    Args:
        model: to be cut.
        stages: pipeline ranks.
        virtual_stages: chunks of each.
        layers_per_stage: layers of each virtual stage in the order of the model; None: by cost.
    """
    total = stages * virtual_stages
    counts = layers_per_stage or split_layers(model, total)
    assert len(counts) == total, f"{len(counts)} numbers of layers for {total} chunks: validate() missed it"
    assert sum(counts) == model.num_layers, f"{sum(counts)} of {model.num_layers} layers: validate() missed it"
    starts = [sum(counts[:index]) for index in range(total)]
    chunks = [
        Chunk(range(start, start + count), index == 0, index == total - 1)
        for index, (start, count) in enumerate(zip(starts, counts, strict=True))
    ]
    return [chunks[stage::stages] for stage in range(stages)]
