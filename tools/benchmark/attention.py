"""Attention of training against torch's own: forward and backward, over several sequence lengths.

Contestants and a product of matrices take turns; ``of products`` is the share of that product's rate, where only pairs
of tokens that see each other count as work.

    python tools/benchmark/attention.py --sequence-lengths 128 512 2048
"""

from __future__ import annotations

import argparse
import statistics

import torch
from kernels import implemented_with
from report import Report, add_json_argument
from synthetic import seconds_in_turns
from torch import Tensor

from megatron_med.errors import ConfigError, run_command
from megatron_med.kernels import backend, functional

PRODUCT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence-lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    add_json_argument(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if backend.choices()["attention"] != backend.NATIVE:
        raise ConfigError(f"The C++ kernels are not installed: {backend.describe()}")
    if not 1 <= min(arguments.sequence_lengths) <= max(arguments.sequence_lengths) <= arguments.tokens:
        raise ConfigError("--sequence-lengths must lie between 1 and --tokens.")
    keys = ("tokens", "heads", "groups", "head_dim", "threads", "rounds")
    report = Report("attention", {key: getattr(arguments, key) for key in keys})
    for length in arguments.sequence_lengths:
        _compare(arguments, length, report)
    report.show()
    if arguments.json:
        report.write(arguments.json)


def _compare(arguments: argparse.Namespace, length: int, report: Report) -> None:
    samples = arguments.tokens // length
    shapes = [(length, samples, n, arguments.head_dim) for n in (arguments.heads, arguments.groups, arguments.groups)]
    parts = [torch.randn(shape, requires_grad=True) for shape in shapes]
    forms = {
        name: implemented_with(kernels)(_attention) for name, kernels in (("ours", "auto"), ("torch", "reference"))
    }
    outs = {name: form(*parts) for name, form in forms.items()}
    grad = torch.randn_like(outs["ours"])
    matrix = torch.randn(PRODUCT, PRODUCT)
    pairs = samples * arguments.heads * length * (length + 1) / 2
    for direction, products in (("forward", 2), ("backward", 5)):
        runs = {
            name: torch.no_grad()(lambda form=form: form(*parts))  # type: ignore[misc]
            if direction == "forward"
            else lambda out=outs[name]: torch.autograd.grad(out, parts, grad, retain_graph=True)
            for name, form in forms.items()
        }
        runs["product"] = lambda: matrix @ matrix
        seconds = seconds_in_turns(runs, arguments.rounds, torch.device("cpu"))
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        rate = 2 * PRODUCT**3 / medians["product"]
        row = {"sequence": length, "direction": direction, "ms": 1e3 * medians["ours"]}
        row["times torch"] = statistics.median(
            theirs / mine for mine, theirs in zip(seconds["ours"], seconds["torch"], strict=True)
        )
        row["of products"] = 2 * products * pairs * arguments.head_dim / medians["ours"] / rate
        report.rows.append(row)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return functional.attention(query, key, value, causal=True)


if __name__ == "__main__":
    run_command(main)
