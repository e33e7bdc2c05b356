"""Local operations against plain definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_med.config.schema import ModelConfig
from megatron_med.kernels import functional as kernels
from megatron_med.kernels.linear import DenseLinear
from megatron_med.model.rope import RotaryEmbedding


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def test_swiglu_and_its_gradient() -> None:
    x = _random(3, 4, 10)
    assert torch.autograd.gradcheck(kernels.swiglu, (x,))
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(kernels.swiglu(x), F.silu(gate) * up)


def test_norms() -> None:
    x, weight, bias = _random(5, 8), _random(8, seed=1), _random(8, seed=2)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    wide = kernels.rms_norm(x.float(), weight.float(), 1e-5)
    torch.testing.assert_close(wide, expected.float(), rtol=1e-5, atol=1e-6)
    half = kernels.rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5)
    torch.testing.assert_close(half.double(), expected, rtol=2e-2, atol=2e-2)
    centred = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(kernels.layer_norm(x, weight, bias, 1e-5), centred * weight + bias)


def test_rotation_is_a_complex_product() -> None:
    """Numbers i and i + d/2 of a head are one complex number, turned by position / theta^(2i/d)."""
    config = ModelConfig("llama", 1, 16, 2, 10, 64)
    positions = torch.tensor([[0, 3, 7], [5, 6, 20]])
    cos, sin = RotaryEmbedding(config, torch.device("cpu"), torch.float64)(positions)
    x = _random(3, 2, 2, 8)
    turned = kernels.apply_rotary_emb(x, cos, sin)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    frequency = torch.tensor([10000 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    angle = positions.t().double()[..., None, None] * frequency
    expected = pairs * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_with_groups(causal: bool) -> None:
    query, key, value = _random(6, 2, 4, 8), _random(6, 2, 2, 8, seed=1), _random(6, 2, 2, 8, seed=2)
    out = kernels.attention(query, key, value, causal=causal).view(6, 2, 4, 8)
    for head in range(4):
        q, k, v = query[:, :, head], key[:, :, head // 2], value[:, :, head // 2]
        scores = torch.einsum("sbd,tbd->bst", q, k) / math.sqrt(8)
        if causal:
            scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
        torch.testing.assert_close(out[:, :, head], torch.einsum("bst,tbd->sbd", scores.softmax(-1), v))


def test_attention_dropout_follows_its_seed() -> None:
    query, key, value = (_random(8, 1, 2, 4, seed=seed) for seed in range(3))
    first, again, other = (
        kernels.attention(query, key, value, causal=True, dropout=0.5, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", [(12, 6), (2, 5, 6)])
def test_linear_products_equal_autograds(shape: tuple[int, ...]) -> None:
    """Forward, input gradient and weight gradient; a 3-D weight is one matrix."""
    x, weight = _random(7, 3, shape[-1]), _random(*shape, seed=1)
    out = F.linear(x, weight.flatten(0, -2))
    gradient = _random(*out.shape, seed=2).detach()
    out.backward(gradient)
    assert x.grad is not None
    assert weight.grad is not None
    local = DenseLinear()
    product, saved = local.forward(x, weight)
    torch.testing.assert_close(product, out)
    torch.testing.assert_close(local.input_grad(weight, saved, gradient), x.grad)
    torch.testing.assert_close(local.weight_grad(x, saved, gradient), weight.grad.flatten(0, -2))
    total = torch.ones_like(weight)
    assert local.weight_grad(x.detach(), saved, gradient, out=total) is None
    torch.testing.assert_close(total, weight.grad + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weight_gradients_are_summed_in_fp32(dtype: torch.dtype) -> None:
    """A thousand small contributions to a large sum: bf16 would lose every one of them."""
    gradient, x = torch.full((1, 4, 8), 2.0**-6, dtype=dtype), torch.ones(1, 4, 6, dtype=dtype)
    total = torch.full((8, 6), 512.0)
    for _ in range(1000):
        DenseLinear().weight_grad(x, (), gradient, out=total)
    assert (total == 512 + 1000 * 4 * 2.0**-6).all()
    assert total.dtype == torch.float32
