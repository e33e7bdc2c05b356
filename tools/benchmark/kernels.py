"""Every kernel of training against plain torch, torch.compile, and a copy of the same bytes with the same threads.

Tensors are larger than the last-level cache (``--megabytes``, at least 8 times it); every input counts as read once and
every output as written once. ``of copy`` is the share of the copy's bandwidth. ``--kilobytes`` measures small tensors
instead, where the calls themselves count.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 python tools/benchmark/kernels.py --precision fp32

Without these two variables glibc gives large tensors back to the system, and what is measured is how fast the kernel
hands out pages: 5 GB/s in the place of 20, for every contestant but the copy.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from report import Report, add_json_argument
from synthetic import seconds_in_turns
from torch import Tensor

from megatron_med.errors import ConfigError, run_command
from megatron_med.kernels import backend, functional
from megatron_med.model.build import DTYPES
from megatron_med.parallel.context import Axis
from megatron_med.parallel.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

Run = Callable[[], object]


@dataclass(frozen=True)
class Operation:
    """What is measured.

    Attributes:
        call: takes ``tensors``, gives a tensor or several.
        tensors: the inputs that have gradients.
        saves_input: whether the backward pass reads them.
    """

    call: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    saves_input: bool = True


class Case:
    """An operation in one implementation, on tensors of its own."""

    def __init__(self, operation: Operation, implement: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._call = implement(operation.call)
        self._tensors = [tensor.detach().clone().requires_grad_() for tensor in operation.tensors]
        outs = self._outs()
        self._grads = [torch.randn_like(out) for out in outs]
        self.forward_bytes = _bytes(*self._tensors, *outs)
        self.backward_bytes = _bytes(*self._grads, *self._tensors, *(self._tensors if operation.saves_input else []))

    def _outs(self) -> tuple[Tensor, ...]:
        outs = self._call(*self._tensors)
        return outs if isinstance(outs, tuple) else (outs,)

    def forward(self) -> Run:
        """The forward pass alone."""
        return torch.no_grad()(self._outs)

    def backward(self) -> Run:
        """The backward pass alone, of a forward pass that is made once."""
        outs = self._outs()
        return lambda: torch.autograd.grad(outs, self._tensors, self._grads, retain_graph=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--megabytes", type=float, default=256, help="of the largest tensor")
    parser.add_argument("--kilobytes", type=float, help="of the largest tensor, in place of megabytes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="torch.compile of the plain form, too")
    add_json_argument(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if backend.choices()["rms_norm"] != backend.NATIVE:
        raise ConfigError(f"The C++ kernels are not installed: {backend.describe()}")
    size = int(arguments.kilobytes * 1e3 if arguments.kilobytes else arguments.megabytes * 1e6)
    settings = {
        "precision": arguments.precision,
        "bytes": size,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
    }
    report = Report(f"kernels {arguments.precision} {size}", settings)
    for name in OPERATIONS:
        _measure(name, size, DTYPES[arguments.precision], arguments, report)
    report.show()
    if arguments.json:
        report.write(arguments.json)


def _measure(name: str, size: int, dtype: torch.dtype, arguments: argparse.Namespace, report: Report) -> None:
    operation = OPERATIONS[name](size // dtype.itemsize, dtype)
    forms = {"ours": implemented_with("auto"), "torch": implemented_with("reference")}
    if arguments.compiled:
        forms["compiled"] = lambda call: torch.compile(implemented_with("reference")(call))
    cases = {form: Case(operation, implement) for form, implement in forms.items()}
    for direction in ("forward", "backward"):
        moved = getattr(cases["ours"], f"{direction}_bytes")
        runs = {form: getattr(case, direction)() for form, case in cases.items()}
        source, target = (torch.empty(moved // 2, dtype=torch.uint8) for _ in range(2))
        runs["copy"] = lambda source=source, target=target: target.copy_(source)
        seconds = seconds_in_turns(runs, arguments.rounds, torch.device("cpu"), warm_up=2)
        _report(f"{name} {direction}", seconds, moved, report)


def _report(name: str, seconds: dict[str, list[float]], moved: int, report: Report) -> None:
    """One row a direction: bandwidths, and how often faster ours is."""
    medians = {form: statistics.median(times) for form, times in seconds.items()}
    row = {"kernel": name, "GB/s": moved / medians["ours"] / 1e9, "of copy": medians["copy"] / medians["ours"]}
    for form in seconds:
        if form not in ("ours", "copy"):
            ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds[form], strict=True)]
            row[f"times {form}"] = statistics.median(ratios)
    report.rows.append(row)


def implemented_with(kernels: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a call use what ``kernels`` of the configuration asks for."""

    def implement(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*tensors: Tensor) -> Any:
            backend.ask_for(kernels)
            return call(*tensors)

        return run

    return implement


WIDTH = 2048


def _rows(count: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(max(1, count // width), width).to(dtype)


def _vector(dtype: torch.dtype) -> Tensor:
    return torch.randn(WIDTH).to(dtype)


def _rms_norm(count: int, dtype: torch.dtype) -> Operation:
    tensors = (_rows(count, WIDTH, dtype), _vector(dtype))
    return Operation(lambda x, weight: functional.rms_norm(x, weight, 1e-5), tensors)


def _layer_norm(count: int, dtype: torch.dtype) -> Operation:
    tensors = (_rows(count, WIDTH, dtype), _vector(dtype), _vector(dtype))
    return Operation(lambda x, weight, bias: functional.layer_norm(x, weight, bias, 1e-5), tensors)


def _swiglu(count: int, dtype: torch.dtype) -> Operation:
    return Operation(functional.swiglu, (_rows(count, 2 * WIDTH, dtype),))


def _gelu(count: int, dtype: torch.dtype) -> Operation:
    return Operation(functional.gelu_tanh, (_rows(count, WIDTH, dtype),))


def _split_qkv(count: int, dtype: torch.dtype) -> Operation:
    """32 heads of 64 in 8 groups."""
    groups, queries, dim = 8, 4, 64
    tokens = max(1, count // (groups * (queries + 2) * dim))
    angles = torch.randn(tokens, 1, 1, dim)
    rotary = angles.cos().to(dtype), angles.sin().to(dtype)
    mixed = torch.randn(tokens, 1, groups, queries + 2, dim).to(dtype)
    return Operation(lambda mixed: functional.split_qkv(mixed, queries, rotary), (mixed,), saves_input=False)


def _cross_entropy(count: int, dtype: torch.dtype) -> Operation:
    columns = min(32_000, count)
    logits = _rows(count, columns, dtype)
    targets = torch.arange(len(logits)) % columns
    return Operation(lambda logits: vocab_parallel_cross_entropy(logits, targets, columns, Axis()), (logits,))


OPERATIONS = {
    "RMSNorm": _rms_norm,
    "LayerNorm": _layer_norm,
    "SwiGLU": _swiglu,
    "GELU": _gelu,
    "q, k, v with rotary": _split_qkv,
    "cross entropy": _cross_entropy,
}


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


if __name__ == "__main__":
    run_command(main)
