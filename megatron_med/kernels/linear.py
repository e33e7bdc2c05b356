"""The local product of a linear layer as an object, so that a weight's format is written once for every topology.

A weight may have more than two dimensions, ``[parts, out, in]``: it is one matrix of ``parts * out`` rows.
"""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class LocalLinear(ABC):
    """``Y = X W^T + b`` on one rank, its gradients ``dX = dY W`` and ``dW = dY^T X``, for one format of the weight.

    It knows no process group; what goes over the network is the business of whoever calls it. The weight is passed at
    each call, since full sharding swaps it. ``saved`` is what the backward pass needs besides ``X`` and ``W`` (scales,
    quantised operands): a tuple of tensors for ``save_for_backward``, never a gathered input.
    """

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``x [..., in]``, ``weight [out, in]``, ``bias [out]`` -> ``[..., out]`` and ``saved``."""

    @abstractmethod
    def input_grad(self, weight: Tensor, saved: tuple[Tensor, ...], grad: Tensor) -> Tensor:
        """``dX = dY W``: ``grad [..., out]`` -> ``[..., in]``."""

    @abstractmethod
    def weight_grad(
        self, x: Tensor, saved: tuple[Tensor, ...], grad: Tensor, out: Tensor | None = None
    ) -> Tensor | None:
        """``dW = dY^T X``.

        Args:
            x: ``[..., in]``, the input of ``forward``.
            saved: what ``forward`` gave.
            grad: ``[..., out]``, the gradient of the output.
            out: fp32 main gradient, shaped like the weight, to which ``dW`` is added; None returns ``dW [out, in]``.
        """


def own(view: Tensor, shape: Sequence[int]) -> Tensor:
    """A result of that shape in the same memory, which nobody else holds: adapters add to it in place, and autograd
    would refuse to let them add to a view."""
    return torch.ops.aten._unsafe_view(view, shape)


def has_bf16_products(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bf16 faster than in fp32."""
    if device.type != "cpu":
        return True
    if platform.machine() not in ("x86_64", "AMD64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``X W^T + b``: ``x [..., in]``, ``weight [out, in]``, ``bias [out]``. No view, as torch gives with a bias."""
    out = F.linear(x, weight, bias)
    return own(out, out.shape) if out._is_view() else out


class DenseLinear(LocalLinear):
    """Weights in the precision that the model computes with: fp32, bf16 or fp16. Saves nothing."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        return linear(x, _matrix(weight), None if bias is None else bias.flatten()), ()

    def input_grad(self, weight: Tensor, saved: tuple[Tensor, ...], grad: Tensor) -> Tensor:
        return grad @ _matrix(weight)

    def weight_grad(
        self, x: Tensor, saved: tuple[Tensor, ...], grad: Tensor, out: Tensor | None = None
    ) -> Tensor | None:
        """On CUDA half-precision products are summed into fp32 by the product itself; the CPU has no such product, so
        its result is added in fp32."""
        left, right = _rows(grad).t(), _rows(x)
        if out is None:
            return left @ right
        total = _matrix(out)
        if left.dtype == total.dtype:
            total.addmm_(left, right)
        elif total.is_cuda:
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
        else:
            total.add_(left @ right)
        return None


def _matrix(weight: Tensor) -> Tensor:
    return weight.flatten(0, -2)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2)
