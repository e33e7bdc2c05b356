"""Tokens per second of one training process, compared with plain transformers: same model, batches and threads.

Both take turns, step by step, in one process; the medians and the ratio are printed.

    python tools/benchmark/throughput.py --preset llama-10m --sequence-length 256 --micro-batch-size 4
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from synthetic import add_step_arguments, make_config, make_step, medians_in_turns, random_ids
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_med.checkpoint.huggingface.config import to_huggingface
from megatron_med.config.schema import ModelConfig
from megatron_med.errors import run_command
from megatron_med.model.build import DTYPES
from megatron_med.parallel.context import single_process_context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_arguments(parser, steps=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = make_config(arguments.preset, arguments.sequence_length, arguments.micro_batch_size, arguments.precision)
    ids = random_ids(config, device)
    contestants = {
        "megatron_med": make_step(config, single_process_context(device), ids)[1],
        "transformers": _theirs(config.model, ids, arguments.precision, device),
    }
    tokens = arguments.micro_batch_size * arguments.sequence_length
    medians = medians_in_turns(contestants, arguments.steps, device, warm_up=2)
    for name, median in medians.items():
        print(f"{name:14} {tokens / median:10,.0f} tokens/s (median of {arguments.steps} steps)")
    print(f"ratio          {medians['transformers'] / medians['megatron_med']:10.3f}")


def _theirs(model: ModelConfig, ids: torch.Tensor, precision: str, device: torch.device) -> Callable[[], object]:
    fields = to_huggingface(model, "float32", None, None)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    theirs = AutoModelForCausalLM.from_config(config).to(device, DTYPES[precision]).train()
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        logits = theirs(ids[:, :-1]).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    return step


if __name__ == "__main__":
    run_command(main)
