"""Choosing tokens from logits."""

from __future__ import annotations

import pytest
import torch

from megatron_med.generate.sampling import Sampling, next_token


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-3])
def test_a_temperature_near_zero_takes_the_most_likely_token(temperature: float) -> None:
    logits = torch.tensor([[1.0, 5.0, 4.0], [300.0, -300.0, 0.0]])
    generator = torch.Generator().manual_seed(1)
    assert next_token(logits, Sampling(temperature), generator).tolist() == [1, 0]


def test_shares_follow_the_temperature() -> None:
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1]])).expand(20_000, 3)
    drawn = next_token(logits, Sampling(0.5), torch.Generator().manual_seed(2))
    expected = torch.tensor([0.49, 0.04, 0.01]) / 0.54
    torch.testing.assert_close(drawn.bincount(minlength=3) / 20_000, expected, atol=0.01, rtol=0)
