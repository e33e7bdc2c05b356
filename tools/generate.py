"""Continues a prompt with a trained checkpoint; under torchrun with --tensor and --pipeline on several ranks."""

from __future__ import annotations

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_med.config import ParallelConfig
from megatron_med.errors import CheckpointError, ConfigError, run_command
from megatron_med.generate.generator import Generator
from megatron_med.generate.sampling import Sampling
from megatron_med.launch.environment import read_ranks
from megatron_med.launch.process_group import start_process_group
from megatron_med.model.build import DTYPES
from megatron_med.parallel.context import ParallelContext, create_context, single_process_context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="RUN, RUN/checkpoints or one step folder")
    parser.add_argument("--base", help="of adapters, where it is no longer where they were trained")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to go on from")
    prompt.add_argument("--prompt-ids", nargs="+", type=int, help="token ids, for a checkpoint without a tokenizer")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="only the k most likely tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="only tokens whose probabilities add up to p")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--quantize",
        choices=("none", "int8", "nf4"),
        help="hold the matrices in 8 or 4 bit; default: as they were while adapters were trained",
    )
    parser.add_argument("--add-bos", action="store_true", help="begin with the tokenizer's begin-of-sequence id")
    arguments = parser.parse_args()
    try:
        context = _context(arguments.tensor, arguments.pipeline)
        _generate(arguments, context)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _context(tensor: int, pipeline: int) -> ParallelContext:
    _, world_size = read_ranks()
    if world_size != tensor * pipeline:
        raise ConfigError(
            f"The world size is {world_size}: --tensor x --pipeline = {tensor} x {pipeline} ranks are needed. "
            f"Start with torchrun --nproc-per-node {tensor * pipeline}."
        )
    if world_size == 1:
        return single_process_context(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device, _ = start_process_group(timedelta(minutes=10))
    return create_context(ParallelConfig(tensor=tensor, pipeline=pipeline, sequence_parallel=False), device)


def _generate(arguments: argparse.Namespace, context: ParallelContext) -> None:
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {arguments.max_new_tokens}: it must be at least 1.")
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    generator = Generator(
        arguments.checkpoint,
        context,
        DTYPES[arguments.precision],
        base=arguments.base,
        quantize=arguments.quantize,
    )
    ids = arguments.prompt_ids or _encode(arguments, generator)
    stop_id = generator.stop_id
    new = list(generator.stream(ids, arguments.max_new_tokens, sampling, arguments.seed, stop_id))
    if not context.world.is_first:
        return
    if new and new[-1] == stop_id:
        new.pop()  # the end of a document or a turn is no text
    if generator.tokenizer is None:
        print(" ".join(map(str, [*ids, *new])))
    else:
        print(generator.tokenizer.decode([*ids, *new]))


def _encode(arguments: argparse.Namespace, generator: Generator) -> list[int]:
    if generator.tokenizer is None:
        raise CheckpointError(f"{arguments.checkpoint} holds no tokenizer: give --prompt-ids instead of --prompt.")
    try:
        prompt = os.fsencode(arguments.prompt).decode("utf-8")  # whatever the locale has made of it
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt is not UTF-8 text (byte {error.start}): write it in UTF-8.") from error
    ids = generator.tokenizer.encode(prompt)
    if arguments.add_bos and generator.tokenizer.bos_id is not None:
        ids = [generator.tokenizer.bos_id, *ids]
    return ids


if __name__ == "__main__":
    run_command(main)
