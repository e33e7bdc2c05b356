"""Recompute keeps less and gives bitwise the same; a pipeline stage keeps no output that it has sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_med.config.presets import PRESETS
from megatron_med.config.schema import ModelConfig, ParallelConfig
from megatron_med.model.batch import plain_batch
from megatron_med.model.build import build_chunks
from megatron_med.model.recompute import Recompute
from megatron_med.parallel.context import single_process_context
from megatron_med.parallel.parameters import initialise, parameters_with_layout

SEQ, BATCH = 64, 2


def _run(family: str, recompute: Recompute, dropout: float) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes of activations that autograd keeps for the backward pass, and the gradients."""
    context = single_process_context()
    changes: dict[str, Any] = {"num_layers": 4, "vocab_size": 256}
    if family == "gpt2":
        changes |= {"hidden_dropout": dropout, "attention_dropout": dropout, "embedding_dropout": dropout}
    model = ModelConfig(**PRESETS[f"{family}-tiny"] | changes)
    (chunk,) = build_chunks(model, context, torch.float32, ParallelConfig(), recompute)
    initialise(chunk, context, seed=1)
    chunk.train()
    tokens = torch.arange(SEQ * BATCH).view(BATCH, SEQ) % 256
    batch = plain_batch(tokens, dropout_key="1.2.3")
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = chunk.loss(chunk(None, batch), batch)
    kept_in_forward = sum(kept.values())
    loss.backward()
    gradients = {layout.name: parameter.grad for layout, parameter in parameters_with_layout(chunk)}
    return kept_in_forward, {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_full_recompute_keeps_the_inputs_of_layers_only(family: str) -> None:
    all_kept, gradients = _run(family, Recompute(), 0.1)
    every_second, again = _run(family, Recompute("full", 2), 0.1)
    none_kept, once_more = _run(family, Recompute("full"), 0.1)
    assert none_kept < every_second < all_kept
    assert all_kept - none_kept == pytest.approx(2 * (all_kept - every_second), rel=0.1), "half of the layers"
    for name, gradient in gradients.items():
        assert torch.equal(again[name], gradient), name
        assert torch.equal(once_more[name], gradient), name


def test_selective_recompute_drops_the_attention_probabilities() -> None:
    all_kept, gradients = _run("gpt2", Recompute(), 0.1)
    selective, again = _run("gpt2", Recompute("selective"), 0.1)
    probabilities = 4 * 8 * BATCH * SEQ * SEQ * 4  # layers, heads, fp32
    assert all_kept - selective >= probabilities
    for name, gradient in gradients.items():
        assert torch.equal(again[name], gradient), name


def test_selective_recompute_leaves_a_fused_kernel_alone() -> None:
    """Without dropout the kernel never keeps its probabilities: computing it again would cost time for nothing."""
    assert _run("llama", Recompute("selective"), 0.0)[0] == _run("llama", Recompute(), 0.0)[0]
