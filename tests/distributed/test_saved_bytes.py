"""What a parallel linear keeps for its backward pass: the cut input, never a gathered one, and nothing twice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_med.config import ParallelConfig
from megatron_med.kernels.linear import LocalLinear
from megatron_med.model.recompute import recomputed
from megatron_med.parallel.context import create_context
from megatron_med.parallel.parameters import MainGrad
from megatron_med.parallel.pipeline_parallel.weight_grad_store import WeightGradStore
from megatron_med.parallel.tensor_parallel.layers import (
    ColumnParallelLinear,
    ParallelLinear,
    RowParallelLinear,
    share_weight_grad_store,
)
from tests.ranks import run_ranks

SEQ, BATCH, HIDDEN, INNER, TP = 16, 3, 8, 24, 2
CUT_INPUT = SEQ // TP * BATCH * HIDDEN
CUT_INNER = SEQ * BATCH * INNER // TP
CUT_OUTPUT = SEQ // TP * BATCH * HIDDEN


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of all storages, each once."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _measure(case: str) -> tuple[int, int]:
    """Bytes between forward and backward pass, and bytes that deferred weight gradients hold after it."""
    context = create_context(ParallelConfig(tensor=TP), torch.device("cpu"))
    column = ColumnParallelLinear((INNER, HIDDEN), context, torch.bfloat16, bias=False, init_std=1.0)
    row = RowParallelLinear((HIDDEN, INNER), context, torch.bfloat16, bias=False, init_std=1.0)
    layers: list[ParallelLinear] = [column, row]
    store = WeightGradStore()
    share_weight_grad_store(layers, store)
    weights = {layer.weight.untyped_storage()._cdata for layer in layers}
    for layer in layers:
        torch.nn.init.ones_(layer.weight)
        if case == "frozen":
            layer.weight.requires_grad_(False)
        elif case != "full sharding":
            total = torch.zeros_like(layer.weight, dtype=torch.float32)
            layer.weight.main_grad = MainGrad(total, lambda: None)  # type: ignore[attr-defined]
    x = torch.ones(SEQ // TP, BATCH, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = recomputed(lambda y: row(column(y)), x) if case == "recompute" else row(column(x))
    between = _bytes(kept)
    gradient = torch.ones_like(out)
    if case != "zero bubble":
        out.backward(gradient)
        return between, 0
    with store.defer() as deferred:
        out.backward(gradient)
    held = [argument for product in deferred for argument in _tensors(product)]
    after = _bytes(held)
    with torch.no_grad():  # as the engine runs them
        for product in deferred:
            product()
    for layer in layers:
        assert layer.weight.main_grad.total.abs().sum() > 0  # type: ignore[attr-defined]
    return between, after


def _tensors(product: Any) -> list[Tensor]:
    return [argument for argument in product.args if isinstance(argument, Tensor)]


WANTED = {
    "main gradient": (2 * (CUT_INPUT + CUT_INNER), 0),
    "full sharding": (2 * (CUT_INPUT + CUT_INNER), 0),
    "recompute": (2 * CUT_INPUT, 0),
    # After the input part: both inputs as they were kept, and the gradients of both outputs.
    "zero bubble": (2 * (CUT_INPUT + CUT_INNER), 2 * (CUT_INPUT + CUT_INNER + CUT_INNER + TP * CUT_OUTPUT)),
    "frozen": (0, 0),
}


@pytest.mark.parametrize("case", WANTED)
def test_a_linear_keeps_its_cut_input(case: str) -> None:
    for measured in run_ranks(TP, _measure, case):
        assert measured == WANTED[case]


def _gradients_without_input_gradient() -> list[float]:
    """A trained linear over an input that nothing below is trained for: a frozen embedding."""
    context = create_context(ParallelConfig(tensor=TP), torch.device("cpu"))
    column = ColumnParallelLinear((INNER, HIDDEN), context, torch.float32, bias=False, init_std=1.0)
    torch.nn.init.ones_(column.weight)
    x = torch.ones(SEQ // TP, BATCH, HIDDEN)
    sums = []
    for past_autograd in (False, True):
        if past_autograd:
            column.weight.grad = None
            total, calls = torch.zeros_like(column.weight), []
            main_grad = MainGrad(total, lambda calls=calls: calls.append(1))  # type: ignore[misc]
            column.weight.main_grad = main_grad  # type: ignore[attr-defined]
        F.silu(column(x)).sum().backward()
        gradient = total if past_autograd else column.weight.grad
        assert gradient is not None
        sums.append(gradient.sum().item())
    assert calls == [1]
    assert column.weight.grad is None, "its gradient goes past autograd"
    return sums


def test_a_trained_weight_over_a_frozen_input_gets_its_gradient() -> None:
    for autograds, ours in run_ranks(TP, _gradients_without_input_gradient):
        assert autograds == pytest.approx(ours)
        assert ours != 0


class _HalvedLinear(LocalLinear):
    """Another format: weights count half, and the backward pass needs the scale that the forward pass has found."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert x.shape[0] == SEQ, "the product is of the whole sequence"
        scale = torch.full((1,), 0.5)
        return F.linear(x, weight * scale, bias), (scale,)

    def input_grad(self, weight: Tensor, saved: tuple[Tensor, ...], grad: Tensor) -> Tensor:
        (scale,) = saved
        return grad @ (weight * scale)

    def weight_grad(
        self, x: Tensor, saved: tuple[Tensor, ...], grad: Tensor, out: Tensor | None = None
    ) -> Tensor | None:
        (scale,) = saved
        assert x.shape[0] == SEQ, "gathered again"
        product = grad.flatten(0, 1).t() @ x.flatten(0, 1) * scale
        if out is None:
            return product
        out.add_(product)
        return None


def _other_format(case: str) -> tuple[float, float]:
    """Sums of the gradients of weight and input."""
    context = create_context(ParallelConfig(tensor=TP), torch.device("cpu"))
    column = ColumnParallelLinear((INNER, HIDDEN), context, torch.float32, bias=False, init_std=1.0)
    column.local = _HalvedLinear()
    store = WeightGradStore()
    share_weight_grad_store([column], store)
    with torch.no_grad():
        column.weight.copy_(torch.arange(column.weight.numel()).view_as(column.weight) / 100)
    total = torch.zeros_like(column.weight)
    if case != "full sharding":
        column.weight.main_grad = MainGrad(total, lambda: None)  # type: ignore[attr-defined]
    x = (torch.arange(CUT_INPUT).view(SEQ // TP, BATCH, HIDDEN) / 100).requires_grad_()
    out = recomputed(column, x) if case == "recompute" else column(x)
    if case == "zero bubble":
        with store.defer() as deferred:
            out.square().sum().backward()
        with torch.no_grad():
            for product in deferred:
                product()
    else:
        out.square().sum().backward()
    gradient = column.weight.grad if case == "full sharding" else total
    assert gradient is not None
    assert x.grad is not None
    return gradient.sum().item(), x.grad.sum().item()


@pytest.mark.parametrize("case", ["main gradient", "full sharding", "recompute", "zero bubble"])
def test_another_format_of_the_weight_needs_no_other_layer(case: str) -> None:
    """Under every way that a gradient takes; the expected values by autograd on the whole tensors."""
    weight = (torch.arange(INNER // TP * HIDDEN).view(INNER // TP, HIDDEN) / 100).repeat(TP, 1).requires_grad_()
    x = (torch.arange(CUT_INPUT).view(SEQ // TP, BATCH, HIDDEN) / 100).repeat(TP, 1, 1).requires_grad_()
    F.linear(x, weight * 0.5).square().sum().backward()
    assert weight.grad is not None
    assert x.grad is not None
    for weight_sum, input_sum in run_ranks(TP, _other_format, case):
        assert weight_sum == pytest.approx(weight.grad.sum().item() / TP, rel=1e-5)
        assert input_sum == pytest.approx(x.grad.sum().item() / TP, rel=1e-5)


def _two_stores() -> tuple[bool, bool]:
    context = create_context(ParallelConfig(tensor=TP), torch.device("cpu"))
    layers = [ColumnParallelLinear((4, 4), context, torch.float32, bias=False, init_std=1.0) for _ in range(2)]
    with layers[0].weight_grads.defer():
        return layers[0].weight_grads.is_deferring, layers[1].weight_grads.is_deferring


def test_a_context_holds_nothing_that_changes() -> None:
    """Two engines on one context: what the first one defers is none of the second one's."""
    assert run_ranks(TP, _two_stores) == [(True, False)] * TP
