"""Every parallel layer against its uncut twin in float64; loss, dropout and initialisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_med.config import ModelConfig, ParallelConfig
from megatron_med.model.build import build_stage
from megatron_med.parallel.context import ParallelContext, create_context
from megatron_med.parallel.parameters import initialise, layout_of, parameters_with_layout
from megatron_med.parallel.random import DropoutRegion
from megatron_med.parallel.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_med.parallel.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from tests.ranks import run_ranks
from tests.training import GPT2, LLAMA

SEQ, BATCH, HIDDEN, INNER, VOCAB = 8, 3, 6, 12, 64


def _context(tensor: int, sequence_parallel: bool) -> ParallelContext:
    return create_context(ParallelConfig(tensor=tensor, sequence_parallel=sequence_parallel), torch.device("cpu"))


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _linears(sequence_parallel: bool, tensor: int) -> dict[str, np.ndarray]:
    """A column-parallel layer feeding a row-parallel one; this rank's pieces of results and gradients."""
    context = _context(tensor, sequence_parallel)
    column = ColumnParallelLinear((2, INNER, HIDDEN), context, torch.float64, bias=True, init_std=1.0)
    row = RowParallelLinear((HIDDEN, INNER), context, torch.float64, bias=True, init_std=1.0)
    assert column.bias is not None
    assert row.bias is not None
    with torch.no_grad():
        for seed, parameter in enumerate((column.weight, column.bias, row.weight, row.bias)):
            layout = layout_of(parameter)
            parameter.copy_(layout.cut(_random(*layout.global_shape, seed=seed), context.tp))
    x = _random(SEQ, BATCH, HIDDEN, seed=10)
    upstream = _random(SEQ, BATCH, HIDDEN, seed=11)
    if sequence_parallel:
        x, upstream = x.chunk(tensor)[context.tp.rank], upstream.chunk(tensor)[context.tp.rank]
    x = x.clone().requires_grad_()
    first, second = column(x).chunk(2, dim=-1)
    out = row(F.silu(first) * second)
    out.backward(upstream)
    tensors = {"out": out, "x": x.grad, "cw": column.weight.grad, "cb": column.bias.grad}
    tensors |= {"rw": row.weight.grad, "rb": row.bias.grad}
    return {name: value.detach().numpy() for name, value in tensors.items() if value is not None}


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_linear_layers_equal_their_uncut_twins(tensor: int, sequence_parallel: bool) -> None:
    weights = [_random(2, INNER, HIDDEN, seed=0), _random(2, INNER, seed=1)]
    weights += [_random(HIDDEN, INNER, seed=2), _random(HIDDEN, seed=3)]
    cw, cb, rw, rb = (weight.requires_grad_() for weight in weights)
    x = _random(SEQ, BATCH, HIDDEN, seed=10).requires_grad_()
    first, second = F.linear(x, cw.flatten(0, 1), cb.flatten()).chunk(2, dim=-1)
    out = F.linear(F.silu(first) * second, rw, rb)
    out.backward(_random(SEQ, BATCH, HIDDEN, seed=11))
    ranks = run_ranks(tensor, _linears, sequence_parallel, tensor)
    joined = {name: [rank[name] for rank in ranks] for name in ranks[0]}

    def check(name: str, actual: np.ndarray, expected: Any) -> None:
        np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=1e-10, atol=1e-12, err_msg=name)

    check("cw", np.concatenate(joined["cw"], axis=1), cw.grad)
    check("cb", np.concatenate(joined["cb"], axis=1), cb.grad)
    check("rw", np.concatenate(joined["rw"], axis=1), rw.grad)
    if sequence_parallel:
        check("out", np.concatenate(joined["out"]), out)
        check("x", np.concatenate(joined["x"]), x.grad)
        check("rb", sum(joined["rb"]), rb.grad)
    else:
        for rank in range(tensor):
            check("out", joined["out"][rank], out)
            check("x", joined["x"][rank], x.grad)
            check("rb", joined["rb"][rank], rb.grad)


def _embedding(sequence_parallel: bool, tensor: int) -> tuple[np.ndarray, np.ndarray]:
    context = _context(tensor, sequence_parallel)
    layer = VocabParallelEmbedding((VOCAB, HIDDEN), context, torch.float64, init_std=1.0, shared=False)
    with torch.no_grad():
        layer.weight.copy_(layout_of(layer.weight).cut(_random(VOCAB, HIDDEN, seed=0), context.tp))
    out = layer(torch.arange(SEQ * BATCH).view(BATCH, SEQ) * 7 % VOCAB)
    upstream = _random(SEQ, BATCH, HIDDEN, seed=1)
    out.backward(upstream.chunk(tensor)[context.tp.rank] if sequence_parallel else upstream)
    assert layer.weight.grad is not None
    return out.detach().numpy(), layer.weight.grad.numpy()


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_embedding_equals_its_uncut_twin(sequence_parallel: bool) -> None:
    tokens = torch.arange(SEQ * BATCH).view(BATCH, SEQ) * 7 % VOCAB
    weight = _random(VOCAB, HIDDEN, seed=0).requires_grad_()
    out = F.embedding(tokens.t(), weight)
    out.backward(_random(SEQ, BATCH, HIDDEN, seed=1))
    ranks = run_ranks(2, _embedding, sequence_parallel, 2)
    assert weight.grad is not None
    np.testing.assert_allclose(np.concatenate([grad for _, grad in ranks]), weight.grad.numpy(), rtol=1e-12)
    pieces = [piece for piece, _ in ranks]
    actual = np.concatenate(pieces) if sequence_parallel else pieces[1]
    np.testing.assert_allclose(actual, out.detach().numpy(), rtol=1e-12)


def _loss(tensor: int, true_size: int) -> tuple[np.ndarray, np.ndarray]:
    context = _context(tensor, False)
    logits = (_random(SEQ, BATCH, VOCAB, seed=3) * 4).float().chunk(tensor, -1)[context.tp.rank].clone()
    logits.requires_grad_()
    targets = torch.arange(SEQ * BATCH).view(SEQ, BATCH) * 5 % true_size
    losses = vocab_parallel_cross_entropy(logits, targets, true_size, context.tp)
    losses.backward(_random(SEQ, BATCH, seed=4).float())
    assert logits.grad is not None
    return losses.detach().numpy(), logits.grad.numpy()


@pytest.mark.parametrize("true_size", [64, 50, 20])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_cross_entropy_masks_the_padded_columns(tensor: int, true_size: int) -> None:
    """With 20 true columns of 64, whole ranks hold padding only."""
    logits = (_random(SEQ, BATCH, VOCAB, seed=3) * 4).float().double().requires_grad_()
    targets = torch.arange(SEQ * BATCH).view(SEQ, BATCH) * 5 % true_size
    losses = F.cross_entropy(logits[..., :true_size].flatten(0, 1), targets.flatten(), reduction="none")
    losses.backward(_random(SEQ, BATCH, seed=4).flatten())
    assert logits.grad is not None
    ranks = run_ranks(tensor, _loss, tensor, true_size)
    for actual, _ in ranks:
        np.testing.assert_allclose(actual, losses.detach().view(SEQ, BATCH).numpy(), rtol=1e-5, atol=1e-6)
    gradient = np.concatenate([gradient for _, gradient in ranks], axis=-1)
    np.testing.assert_allclose(gradient, logits.grad.numpy(), rtol=1e-4, atol=1e-7)
    assert np.abs(gradient[..., true_size:]).max(initial=0) == 0


def _initial_weights(
    model: dict[str, Any], tensor: int, pipeline: int
) -> list[tuple[str, int | None, int, np.ndarray]]:
    config = ModelConfig(**model)
    context = create_context(ParallelConfig(tensor=tensor, pipeline=pipeline), torch.device("cpu"))
    stage = build_stage(config, context, torch.float32)
    initialise(stage, context, seed=3)
    return [(la.name, la.tp_dim, context.tp.rank, p.detach().numpy()) for la, p in parameters_with_layout(stage)]


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_initial_weights_are_bitwise_equal_under_every_grid(model: dict[str, Any]) -> None:
    (alone,) = run_ranks(1, _initial_weights, model, 1, 1)
    whole = {name: values for name, _, _, values in alone}
    seen = set()
    for rank in run_ranks(4, _initial_weights, model, 2, 2):
        for name, tp_dim, tp_rank, values in rank:
            expected = whole[name] if tp_dim is None else np.split(whole[name], 2, axis=tp_dim)[tp_rank]
            np.testing.assert_array_equal(values, expected, err_msg=name)
            seen.add(name)
    assert seen == whole.keys()
    assert whole["layers.0.mlp.down.weight"].std() == pytest.approx(0.02 / np.sqrt(10), rel=0.1)


def test_dropout_masks_follow_their_names() -> None:
    x = torch.ones(64, 64)
    region = DropoutRegion(0.25, "layers.3.mlp", shard=1)
    same = DropoutRegion(0.25, "layers.3.mlp", shard=1)
    torch.manual_seed(0)
    first = region(x, "7.1.0", training=True)
    torch.manual_seed(99)
    assert torch.equal(first, same(x, "7.1.0", training=True)), "recompute and resume see the same mask"
    assert not torch.equal(first, region(x, "7.2.0", training=True))
    assert not torch.equal(first, region(x, "7.1.1", training=True))
    assert not torch.equal(first, DropoutRegion(0.25, "layers.3.mlp", shard=0)(x, "7.1.0", training=True))
    assert not torch.equal(first, DropoutRegion(0.25, "layers.4.mlp", shard=1)(x, "7.1.0", training=True))
    assert first.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(region(x, "7.1.0", training=False), x)
