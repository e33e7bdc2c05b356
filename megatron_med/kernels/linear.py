"""The local products of a linear layer: forward, gradient of the input, gradient of the weight.

A weight may have more than two dimensions, ``[pieces, out, in]``: it is one matrix of ``pieces * out`` rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., in] @ weight [out, in].T + bias [out]`` -> ``[..., out]``."""
    return F.linear(x, _matrix(weight), None if bias is None else bias.flatten())


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """``gradient [..., out] @ weight [out, in]`` -> ``[..., in]``."""
    return gradient @ _matrix(weight)


def weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``gradient [..., out].T @ x [..., in]``, shaped like the weight."""
    return (_rows(gradient).t() @ _rows(x)).view(weight.shape)


def accumulate_weight_gradient(gradient: Tensor, x: Tensor, total: Tensor) -> None:
    """Adds ``gradient [..., out].T @ x [..., in]`` to ``total``, fp32 and shaped like the weight.

    On CUDA half-precision products are summed into fp32 by the product itself; the CPU has no such product, so its
    result is added in fp32.
    """
    total, left, right = _matrix(total), _rows(gradient).t(), _rows(x)
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.add_(left @ right)


def _matrix(weight: Tensor) -> Tensor:
    return weight.flatten(0, -2)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2)
