"""Products with weights in 8 and 4 bit against 16 and 32 bit and bitsandbytes; an update of the 8-bit optimizer.

All take turns in one process with the same threads; medians, and ratios of these.

    python tools/benchmark/low_bits.py --tokens 512 --shape 2752 1024
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from synthetic import medians_in_turns
from torch import Tensor

from megatron_med.errors import run_command
from megatron_med.kernels.int8 import Int8Linear
from megatron_med.kernels.linear import DenseLinear, LocalLinear
from megatron_med.optim.adamw8bit import AdamW8bit
from megatron_med.parallel.context import single_process_context
from megatron_med.parallel.parameters import ParameterLayout
from megatron_med.parallel.tensor_parallel.quantized import Int8Weight, NF4Weight, StoredMatrix

THRESHOLD = 6.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--shape", type=int, nargs=2, default=[2752, 1024], help="outputs and inputs of the weight")
    parser.add_argument("--outliers", type=int, default=4, help="features in which some input reaches the threshold")
    parser.add_argument("--parameters", type=int, default=1 << 22, help="that the optimizer updates")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out, width = arguments.shape
    print(
        f"{arguments.tokens} tokens through a weight of {out} x {width} on {device.type}, {arguments.threads} threads"
    )
    for dtype in (torch.float32, torch.bfloat16):
        _compare_products(arguments, dtype, device)
    _compare_updates(arguments, device)


def _compare_products(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> None:
    """Forward, and the gradient of the input: all that a frozen weight takes part in."""
    weight = (torch.randn(*arguments.shape, device=device) * 0.02).to(dtype)
    x = torch.randn(arguments.tokens, arguments.shape[1], device=device).to(dtype)
    x[:, : arguments.outliers] *= 4
    grad = torch.randn(arguments.tokens, arguments.shape[0], device=device).to(dtype)
    layout = ParameterLayout(tuple(arguments.shape), tp_dim=0, name="weight")
    context = single_process_context(device)
    int8 = Int8Weight(layout, dtype, context, threshold=THRESHOLD, keeps_dense=False)
    nf4 = NF4Weight(layout, dtype, context, [StoredMatrix()])
    for quantized in (int8, nf4):
        quantized.fill(weight)
    contestants = {
        f"dense {str(dtype).removeprefix('torch.')}": _product(DenseLinear(), x, weight, grad),
        "int8": _product(int8.local_linear(), x, int8.codes, grad),
        "int8, no outliers": _product(Int8Linear(int8.scales, 0.0, None), x, int8.codes, grad),
        "int8, bitsandbytes": _their_int8(x, int8, grad),
        "nf4": _product(nf4.local_linear(), x, nf4.codes, grad),
        "nf4, bitsandbytes": _their_nf4(x, weight, grad),
    }
    _tell(medians_in_turns(contestants, arguments.rounds, device))


def _product(linear: LocalLinear, x: Tensor, weight: Tensor, grad: Tensor) -> Callable[[], Any]:
    return lambda: (linear.forward(x, weight), linear.input_grad(weight, (), grad))


def _their_int8(x: Tensor, weight: Int8Weight, grad: Tensor) -> Callable[[], Any]:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes.autograd._functions import MatMul8bitLt, MatmulLtState

    state = MatmulLtState(CB=weight.codes, SCB=weight.scales)
    state.threshold, state.has_fp16_weights = THRESHOLD, False
    leaf = x.clone().requires_grad_()
    return lambda: MatMul8bitLt.apply(leaf, weight.codes, None, None, state).backward(grad)


def _their_nf4(x: Tensor, weight: Tensor, grad: Tensor) -> Callable[[], Any]:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")

    def run() -> Tensor:
        F.linear(x, bnb.dequantize_4bit(packed, state))
        return grad @ bnb.dequantize_4bit(packed, state)

    return run


def _compare_updates(arguments: argparse.Namespace, device: torch.device) -> None:
    from bitsandbytes.optim import AdamW8bit as TheirAdamW8bit

    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}

    def updates(make: Callable[[list[Any]], torch.optim.Optimizer]) -> Callable[[], Any]:
        parameter = torch.nn.Parameter(torch.randn(arguments.parameters, device=device))
        parameter.grad = torch.randn_like(parameter)
        return make([parameter]).step

    print(f"an update of {arguments.parameters:,} parameters")
    contestants = {
        "AdamW, 32 bit (fused)": updates(lambda p: torch.optim.AdamW(p, fused=True, **options)),
        "AdamW, 8 bit": updates(lambda p: AdamW8bit([{"params": p}], **options)),
        "AdamW, 8 bit, bitsandbytes": updates(lambda p: TheirAdamW8bit(p, **options)),
    }
    _tell(medians_in_turns(contestants, arguments.rounds, device))


def _tell(medians: dict[str, float]) -> None:
    first = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"  {name:<28} {median * 1e3:8.2f} ms, {median / first:5.2f} of the first")


if __name__ == "__main__":
    run_command(main)
