"""Attention over packed documents: borders as ``cu_seqlens``, compared with the dense ``[seq, seq]`` mask.

Both take turns, forward and backward, in one process; the medians and their ratio are printed, and the bytes that each
keeps and needs.

    python tools/benchmark/documents.py --sequence-length 2048 --document-lengths 50 300 2048
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from synthetic import seconds_of
from torch import Tensor

from megatron_med.errors import ConfigError, run_command
from megatron_med.kernels.functional import PackedDocuments, attention
from megatron_med.model.build import DTYPES
from megatron_med.tracing.recorder import Recorder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--document-lengths", type=int, nargs="+", default=[50, 300, 2048])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{arguments.sequence_length} tokens on {device.type}, {arguments.precision}: forward and backward")
    for length in arguments.document_lengths:
        if not 1 <= length <= arguments.sequence_length:
            raise ConfigError(f"A document of {length} tokens: it must lie between 1 and --sequence-length.")
        _compare(arguments, length, device)


def _compare(arguments: argparse.Namespace, length: int, device: torch.device) -> None:
    whole, rest = divmod(arguments.sequence_length, length)
    lengths = [length] * whole + ([rest] if rest else [])
    heads = (arguments.heads, arguments.groups, arguments.groups)  # of queries, keys and values
    shapes = [(arguments.sequence_length, 1, count, arguments.head_dim) for count in heads]
    dtype = DTYPES[arguments.precision]
    inputs = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
    documents = PackedDocuments.of(lengths, device)
    contestants: dict[str, Callable[[], Tensor]] = {
        "cu_seqlens": lambda: attention(*inputs, causal=True, documents=documents),
        "dense mask": lambda: _dense(inputs, lengths),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(arguments.rounds + 1):
        for name, run in contestants.items():
            elapsed = seconds_of(lambda run=run: run().sum().backward(), device)  # type: ignore[misc]
            if turn:
                seconds[name].append(elapsed)
    peaks = {}
    for name, run in contestants.items():
        with Recorder() as recorder:
            run().sum().backward()
        peaks[name] = recorder.peak / 2**20
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        f"documents of {length:>5}: cu_seqlens {medians['cu_seqlens'] * 1e3:8.2f} ms, dense mask "
        f"{medians['dense mask'] * 1e3:8.2f} ms, ratio {medians['dense mask'] / medians['cu_seqlens']:6.2f}; peak "
        f"{peaks['cu_seqlens']:6.1f} and {peaks['dense mask']:6.1f} MiB"
    )


def _dense(inputs: list[Tensor], lengths: list[int]) -> Tensor:
    """What stood here before: a mask of all pairs of tokens, made with the batch."""
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in inputs)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (numbers.unsqueeze(1) == numbers).tril().to(query.device)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=grouped)


if __name__ == "__main__":
    run_command(main)
