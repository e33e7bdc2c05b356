"""Weights that are only read, in the layout that oneDNN's product wants on this CPU.

A product with few rows reads the whole weight: packed once, it is read at the memory's speed, which a plain matrix is
not. The operators are those that torch's own compiler uses for frozen weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_med.kernels.linear import LocalLinear

_ROWS = 16
"""Rows of the input that the layout is chosen for; with more it is no slower than a plain product."""


def can_pack(weight: Tensor) -> bool:
    """Whether this machine has such a product for a weight."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack(weight: Tensor) -> Tensor:
    """``[..., out, in]`` -> the same numbers in a layout that only ``PackedLinear`` can read."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().flatten(0, -2).contiguous(), _ROWS)


class PackedLinear(LocalLinear):
    """``Y = X W^T + b`` with a packed weight. It has no gradients: whatever is trained is not packed."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        flat = None if bias is None else bias.flatten()
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, flat, "none", [], ""), ()

    def input_grad(self, weight: Tensor, saved: tuple[Tensor, ...], grad: Tensor) -> Tensor:
        raise AssertionError("packed weights are only read")

    def weight_grad(
        self, x: Tensor, saved: tuple[Tensor, ...], grad: Tensor, out: Tensor | None = None
    ) -> Tensor | None:
        raise AssertionError("packed weights are only read")
