"""Weights packed for oneDNN, and the most likely token over a cut vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_med.config import ModelConfig
from megatron_med.kernels.packed import PackedLinear, can_pack, pack
from megatron_med.model.build import build_stage
from megatron_med.parallel.context import Axis, single_process_context
from megatron_med.parallel.parameters import initialise
from megatron_med.parallel.tensor_parallel.argmax import NOT_FINITE, vocab_parallel_argmax
from megatron_med.parallel.tensor_parallel.layers import pack_weights
from tests.training import GPT2, LLAMA


@pytest.mark.parametrize("rows", [1, 3, 16, 301])
@pytest.mark.parametrize("shape", [(7, 5), (96, 64), (2, 33, 70)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_product_is_the_product(rows: int, shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(*shape, generator=generator)
    if not can_pack(weight):
        pytest.skip("this CPU, or this build of torch, has no oneDNN")
    x = torch.randn(rows, 1, shape[-1], generator=generator)
    added = torch.randn(*shape[:-1], generator=generator) if bias else None
    out, saved = PackedLinear().forward(x, pack(weight), added)
    expected = F.linear(x.double(), weight.flatten(0, -2).double(), None if added is None else added.flatten().double())
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    assert saved == ()


@pytest.mark.parametrize("shape", [LLAMA, {**LLAMA, "tie_embeddings": True}, GPT2], ids=["llama", "tied", "gpt2"])
def test_packing_gives_up_the_weights_and_keeps_a_tied_embedding(shape: dict[str, object]) -> None:
    context = single_process_context()
    stage = build_stage(ModelConfig(**shape), context, torch.float32).eval()  # type: ignore[arg-type]
    initialise(stage, context, 3)
    if not can_pack(stage.embedding.word.weight):
        pytest.skip("this CPU, or this build of torch, has no oneDNN")
    from megatron_med.model.batch import plain_batch

    batch = plain_batch(torch.arange(20).view(2, 10))
    with torch.no_grad():
        expected = stage(None, batch)
        pack_weights(stage)
        torch.testing.assert_close(stage(None, batch), expected, atol=1e-5, rtol=1e-5)
    left = [name for name, parameter in stage.named_parameters() if parameter.dim() > 1]
    assert set(left) <= {"embedding.word.weight", "embedding.position.weight"}


def test_the_highest_logit_of_the_true_vocabulary() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 9.0], [0.0, float("nan"), 2.0, 0.0], [3.0, float("-inf"), 2.0, 0.0]])
    assert vocab_parallel_argmax(logits, 3, Axis()).tolist() == [1, NOT_FINITE, NOT_FINITE]
    assert vocab_parallel_argmax(logits[:1], 4, Axis()).tolist() == [3]
