"""Tokens per second of a tuning step: in full, with LoRA, beside int8 and NF4 weights, with moments in 32 and in 8 bit.

All take turns, step by step, in one process with the same batch and threads; medians, and ratios to the first.

    python tools/benchmark/tuning.py --preset llama-10m --sequence-length 256 --micro-batch-size 4 --precision bf16
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from report import Report, add_json_argument
from synthetic import make_config, make_step, random_ids, seconds_in_turns, step_parser

from megatron_med.config.schema import LoRAConfig, QuantizeConfig
from megatron_med.errors import run_command
from megatron_med.parallel.context import single_process_context
from megatron_med.parallel.tensor_parallel.quantized import quantized_weights

WAYS: dict[str, tuple[str, int, QuantizeConfig]] = {
    "full": ("adamw", 0, QuantizeConfig()),
    "full, 8-bit AdamW": ("adamw8bit", 0, QuantizeConfig()),
    "LoRA": ("adamw", 8, QuantizeConfig()),
    "LoRA on int8": ("adamw", 8, QuantizeConfig(base="int8")),
    "LoRA on int8, 8-bit AdamW": ("adamw8bit", 8, QuantizeConfig(base="int8")),
    "LoRA on NF4": ("adamw", 8, QuantizeConfig(base="nf4")),
}


def main() -> None:
    parser = step_parser(__doc__, steps=9)
    add_json_argument(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    contestants = {name: _step(arguments, name, device) for name in WAYS}
    tokens = arguments.micro_batch_size * arguments.sequence_length
    named = {name: getattr(arguments, name) for name in ("preset", "precision", "threads", "steps")}
    report = Report(f"tuning {arguments.preset} {arguments.precision}", named | {"tokens": tokens})
    report.add_turns(seconds_in_turns(contestants, arguments.steps, device, warm_up=2))
    for row in report.rows:
        row["tokens/s"] = 1e3 * tokens / row["ms"]
    report.show()
    if arguments.json:
        report.write(arguments.json)


def _step(arguments: argparse.Namespace, name: str, device: torch.device) -> Callable[[], object]:
    """One training step of a way, beside weights that are numbers."""
    config = make_config(arguments.preset, arguments.sequence_length, arguments.micro_batch_size, arguments.precision)
    optimizer, rank, config.quantize = WAYS[name]
    config.optimizer.name = optimizer  # type: ignore[assignment]
    config.lora = LoRAConfig(rank=rank)
    train_module, step = make_step(config, single_process_context(device), random_ids(config, device))
    for weight in quantized_weights(train_module.chunks):
        shape = weight.layout.global_shape
        weight.fill((torch.randn(shape, device=device) * config.model.init_std).to(weight.dtype))
    return step


if __name__ == "__main__":
    run_command(main)
