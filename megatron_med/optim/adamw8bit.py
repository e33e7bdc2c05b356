"""AdamW whose moments are held in 8 bit, block by block (Dettmers et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_med.config.schema import OptimizerConfig
from megatron_med.kernels.blockwise import BLOCK, blocks_of, dequantize_blocks, quantize_blocks
from megatron_med.parallel.parameters import ParameterLayout

SMALLEST = 4_096
"""A parameter with fewer values keeps its moments in 32 bit."""

EMBEDDING = "embedding."
"""Parameters whose moments stay in 32 bit: few tokens of a batch touch a row (Dettmers et al. 2021, section 2.3)."""

SIGNED = {"exp_avg": True, "exp_avg_sq": False}
"""Whether a moment's values may be negative."""

_AT_ONCE = BLOCK << 10


def in_8_bit(layout: ParameterLayout, optimizer: OptimizerConfig) -> bool:
    """Whether the moments of a parameter are held in 8 bit: told by the whole of it, so the same on any grid."""
    size = math.prod(layout.global_shape)
    return optimizer.name == "adamw8bit" and size >= SMALLEST and not layout.name.startswith(EMBEDDING)


def maxima_name(moment: str) -> str:
    """Name of the state that holds the largest absolute values of a moment's blocks."""
    return f"{moment}_max"


def empty_moments(master: Tensor) -> dict[str, Tensor]:
    """Moments that are zero: for each the codes, shaped like the master, and the maxima of its blocks, fp32."""
    state = {}
    for moment in SIGNED:
        state[moment] = torch.zeros_like(master, dtype=torch.uint8)
        state[maxima_name(moment)] = torch.zeros(blocks_of(master.numel()), device=master.device)
    return state


class AdamW8bit(torch.optim.Optimizer):
    """The update of AdamW (Loshchilov and Hutter 2019) on dequantised moments, which are quantised again afterwards.

    Args:
        groups: as of torch's optimizers, with ``weight_decay``; parameters contiguous and fp32.
        lr, betas, eps: as of AdamW.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        for group in self.param_groups:
            for master in group["params"]:
                self.state[master] = {"step": torch.zeros((), dtype=torch.float32)} | empty_moments(master)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "the gradients are there"
        for group in self.param_groups:
            for master in group["params"]:
                state = self.state[master]
                state["step"] += 1
                self._update(master, state, group)

    @staticmethod
    def _update(master: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Some blocks at a time, so that little is ever in 32 bit."""
        step, lr, (beta1, beta2) = int(state["step"]), group["lr"], group["betas"]
        correction1, correction2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
        weights, gradients = master.view(-1), master.grad.view(-1)  # type: ignore[union-attr]
        for start in range(0, weights.numel(), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            weight, gradient = weights[part], gradients[part]
            first, second = (_values(state, moment, part) for moment in SIGNED)
            first.mul_(beta1).add_(gradient, alpha=1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            if group["weight_decay"]:
                weight.mul_(1 - lr * group["weight_decay"])
            weight.addcdiv_(first, (second.sqrt() / correction2).add_(group["eps"]), value=-lr / correction1)
            for moment, values in zip(SIGNED, (first, second), strict=True):
                codes, maxima = quantize_blocks(values, SIGNED[moment])
                state[moment].view(-1)[part] = codes
                _maxima(state, moment, part).copy_(maxima)


def _values(state: dict[str, Tensor], moment: str, part: slice) -> Tensor:
    return dequantize_blocks(state[moment].view(-1)[part], _maxima(state, moment, part), SIGNED[moment])


def _maxima(state: dict[str, Tensor], moment: str, part: slice) -> Tensor:
    return state[maxima_name(moment)][part.start // BLOCK : blocks_of(part.stop)]
