"""AdamW in 8 bit: bitsandbytes' own optimizer, and torch's where the moments stay in 32 bit."""

from __future__ import annotations

import bitsandbytes as bnb
import bitsandbytes.functional
import pytest
import torch

from megatron_med.kernels.blockwise import dequantize_blocks, dynamic_codes, quantize_blocks
from megatron_med.optim.adamw8bit import AdamW8bit

CPU = torch.device("cpu")


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_published_ones(signed: bool) -> None:
    assert torch.equal(dynamic_codes(signed, CPU), bitsandbytes.functional.create_dynamic_map(signed))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [1, 255, 256, 70_000, 1 << 19])
def test_blocks_are_bitwise_those_of_bitsandbytes(count: int, signed: bool) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    values = values * values.abs() if signed else values.square().square()
    values[: count // 3] = 0
    code = bitsandbytes.functional.create_dynamic_map(signed)
    theirs, their_maxima = torch.ops.bitsandbytes.quantize_blockwise(values, code, 256)
    codes, maxima = quantize_blocks(values, signed)
    assert torch.equal(maxima, their_maxima)
    some = maxima.repeat_interleave(256)[:count] > 0  # codes of nothing mean nothing
    assert torch.equal(codes[some], theirs[some])
    expected = torch.ops.bitsandbytes.dequantize_blockwise(theirs, their_maxima, code, 256, torch.float32)
    assert torch.equal(dequantize_blocks(codes, maxima, signed), expected)


@pytest.mark.parametrize("shape", [(64, 96), (37, 301), (3, 40, 50)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_updates_are_bitwise_those_of_bitsandbytes(shape: tuple[int, ...], weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    group = {"params": [mine], "weight_decay": weight_decay}
    ours = AdamW8bit([group], lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    oracle = bnb.optim.AdamW8bit([theirs], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    for step in range(20):
        gradient = torch.randn(shape, generator=generator) * 10.0 ** -(step % 4)
        for parameter, optimizer in ((mine, ours), (theirs, oracle)):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(mine, theirs)
    state = oracle.state[theirs]
    assert torch.equal(ours.state[mine]["exp_avg"], state["state1"])
    assert torch.equal(ours.state[mine]["exp_avg_sq_max"], state["absmax2"])


def test_many_blocks_are_updated_like_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large parameter is updated in pieces."""
    results = []
    for at_once in (256, 1 << 20):
        monkeypatch.setattr("megatron_med.optim.adamw8bit._AT_ONCE", at_once)
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 5000))
        optimizer = AdamW8bit([{"params": [parameter]}], lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
        for _ in range(3):
            parameter.grad = parameter.detach().sin()
            optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)
