"""Products with weights in 8 and 4 bit: bitsandbytes' and the paper's rule, gradients in float64, odd inputs."""

from __future__ import annotations

import logging

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt, MatmulLtState
from torch import Tensor

from megatron_med.config.schema import QuantizeConfig
from megatron_med.kernels.int8 import Int8Linear, int8_linear, quantize_weight, row_maxima
from megatron_med.kernels.nf4 import blocks_of, nf4_dequantize, quantize_nf4
from megatron_med.parallel.context import single_process_context
from megatron_med.parallel.tensor_parallel.layers import ColumnParallelLinear, ParallelLinear, RowParallelLinear
from megatron_med.parallel.tensor_parallel.lora import LoRASettings
from megatron_med.parallel.tensor_parallel.quantized import Int8Weight, NF4Weight, StoredMatrix

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
OUT, WIDTH, THRESHOLD = 80, 192, 6.0


def _weight(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weight = (torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    codes, scales = torch.empty(OUT, WIDTH, dtype=torch.int8), row_maxima(weight)
    quantize_weight(weight, scales, codes)
    return weight, codes, scales


def _inputs(rows: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows))
    x[:, 7] *= 8
    x[0, 100] = -6.0  # reaches the threshold exactly
    return x.to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_products_are_those_of_bitsandbytes(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    """Its kernel for the CPU divides by 127^2 x (1 - 1.8e-5): a constant has lost a digit."""
    weight, codes, scales = _weight(dtype)
    their_codes, their_scales, _ = bnb.int8_vectorwise_quant(weight.half())
    assert torch.equal(codes, their_codes)
    assert torch.equal(scales, their_scales)
    state = MatmulLtState(CB=their_codes, SCB=their_scales)
    state.threshold, state.has_fp16_weights = THRESHOLD, False
    x = _inputs(rows, dtype).requires_grad_()
    theirs = MatMul8bitLt.apply(x, weight, None, None, state)
    linear = Int8Linear(scales, THRESHOLD, None)
    mine, _ = linear.forward(x.detach(), codes)
    assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()
    grad = torch.randn(rows, OUT, generator=torch.Generator().manual_seed(1)).to(dtype)
    theirs.backward(grad)
    assert x.grad is not None
    assert (linear.input_grad(codes, (), grad) - x.grad).abs().max() <= tolerance * x.grad.abs().max()


@pytest.mark.parametrize("threshold", [0.0, 2.5, THRESHOLD])
def test_the_papers_rule_in_float64(threshold: float) -> None:
    """Columns with an outlier are left out of the maxima, and multiplied with the weight as it was."""
    weight, codes, scales = _weight(torch.float32)
    x = _inputs(33, torch.float32)
    aside = (x.half().abs() >= threshold).any(dim=0) if threshold else torch.zeros(WIDTH, dtype=torch.bool)
    assert aside.any() == (threshold > 0)
    inside = x.half().double() * ~aside
    maxima = inside.abs().amax(dim=1, keepdim=True)
    sums = (inside * 127 / maxima).float().round().double() @ codes.double().t()
    expected = sums * maxima * scales.double() / 127**2 + (x.double() * aside) @ weight.double().t()
    mine = int8_linear(x, codes, scales, threshold, weight, True)
    assert (mine - expected).abs().max() <= 1e-6 * expected.abs().max()
    other = int8_linear(x, codes, scales, threshold, None, False)
    assert (other - mine).abs().max() > 1e-4 or not threshold


def test_rows_of_nothing_and_of_outliers_alone() -> None:
    _, codes, scales = _weight(torch.float32)
    x = torch.zeros(3, WIDTH)
    x[1] = 7.0
    out = int8_linear(x, codes, scales, THRESHOLD, None, False)
    assert torch.equal(out[0], torch.zeros(OUT))
    dequantized = codes.double() * scales.double().unsqueeze(1) / 127
    assert (out[1] - 7 * dequantized.sum(dim=1)).abs().max() < 1e-4
    zeros = torch.empty(2, WIDTH, dtype=torch.int8)
    quantize_weight(torch.zeros(2, WIDTH), torch.zeros(2), zeros)
    assert not zeros.any()


def test_operations_are_ones_that_torch_can_trust() -> None:
    weight, codes, scales = _weight(torch.float32)
    x = _inputs(5, torch.float32)
    operations = torch.ops.megatron_med
    torch.library.opcheck(operations.int8_linear.default, (x, codes, scales, THRESHOLD, None, False))
    maxima = x.abs().amax(dim=1)
    torch.library.opcheck(operations.int8_partial_product.default, (x, codes, scales, maxima, 0.0, weight))
    packed, largest = torch.empty(OUT * WIDTH // 2, dtype=torch.uint8), torch.empty(blocks_of(OUT * WIDTH))
    quantize_nf4(weight, packed, largest)
    torch.library.opcheck(operations.nf4_dequantize.default, (packed, largest, OUT * WIDTH, torch.bfloat16))
    torch.library.opcheck(operations.quantize_blocks.default, (x, True))


@pytest.mark.parametrize("count", [1, 63, 65, 127, 4097])
def test_odd_counts_survive_nf4(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    codes, maxima = torch.empty((count + 1) // 2, dtype=torch.uint8), torch.empty(blocks_of(count))
    quantize_nf4(values, codes, maxima)
    assert (nf4_dequantize(codes, maxima, count, torch.float32) - values).abs().max() <= 0.16 * maxima.max()


FORMATS = [QuantizeConfig(base="int8"), QuantizeConfig(base="nf4")]


@pytest.mark.parametrize("quantize", FORMATS, ids=["int8", "nf4"])
@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_gradients_pass_through_in_float64(
    quantize: QuantizeConfig, kind: type[ParallelLinear], dtype: torch.dtype, bound: float
) -> None:
    """Those of an adapter and of the input: what the dequantised weight and the adapter give, to the stated bound."""
    context = single_process_context()
    linear = kind((OUT, WIDTH), context, dtype, bias=False, init_std=0.02)  # type: ignore[call-arg, arg-type]
    layout = linear.weight_layout
    weight = (
        Int8Weight(layout, dtype, context, threshold=THRESHOLD, keeps_dense=False)
        if quantize.base == "int8"
        else NF4Weight(layout, dtype, context, [StoredMatrix()])
    )
    weight.fill(_weight(dtype)[0])
    linear.quantize(weight)
    linear.add_lora({"t": None}, LoRASettings(4, 2.0, 0.0, 1.0), "region")  # type: ignore[operator]
    assert linear.lora is not None
    generator = torch.Generator().manual_seed(2)
    a, b = linear.lora.t_A, linear.lora.t_B
    for factor in (a, b):
        factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.1)  # type: ignore[union-attr, operator]
    x = torch.randn(6, 2, WIDTH, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(6, 2, OUT, generator=generator).to(dtype)
    linear(x).backward(grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, a, b)]  # type: ignore[union-attr, operator]
    wide = weight.dequantized(torch.float32).double()
    out = exact[0] @ wide.t() + 2.0 * exact[0] @ exact[1].t() @ exact[2].t()
    out.backward(grad.double())
    for mine, theirs in zip((x, a, b), exact, strict=True):
        difference = (mine.grad.double() - theirs.grad).abs().max()  # type: ignore[union-attr, operator]
        assert difference <= bound * theirs.grad.abs().max()  # type: ignore[union-attr]
