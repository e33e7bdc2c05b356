"""Scores a checkpoint or a Hugging Face folder on medical question sets from local files.

    megatron-med evaluate --checkpoint RUN --tasks medqa_4options pubmedqa --data DIR --output results
    megatron-med evaluate --nproc-per-node 8 -- --tensor 2 --pipeline 2 --checkpoint RUN --score letter option cot ...
    megatron-med evaluate --list

The same command goes on after a kill; a folder takes further tasks, ways and seeds of the same model. lm-eval's own
command line is python -m megatron_med.evaluate.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch.distributed as dist

from megatron_med.commands.arguments import Parser
from megatron_med.errors import ConfigError
from megatron_med.evaluate.catalogue import load_task, task_names
from megatron_med.evaluate.ways import NAMES


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.list:
        for name in task_names():
            print(f"{name}: {load_task(name).source}")
        return
    try:
        from megatron_med.evaluate.options import Options
        from megatron_med.evaluate.session import evaluate
    except ImportError as error:
        raise ConfigError(f"lm-eval is not installed ({error}): pip install 'megatron_med[evaluate]'.") from error
    try:
        evaluate(Options(**{name: value for name, value in vars(arguments).items() if name != "list"}))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say which tasks there are, and where to get their files")
    parser.add_argument("--checkpoint", help="RUN, RUN/checkpoints, one step, or a Hugging Face folder")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK[=FILE]", help="see --list")
    parser.add_argument("--data", type=Path, help="folder with the files of the tasks")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--overwrite", action="store_true", help="begin the results anew")
    parser.add_argument("--score", nargs="+", choices=NAMES, default=["letter"], help="ways of scoring")
    parser.add_argument("--shots", type=int, default=0, help="examples in front of each question")
    parser.add_argument("--shots-from", type=Path, help="file that examples are drawn from; default: found in --data")
    parser.add_argument("--seeds", type=int, nargs="+", default=(1234, 432, 32), help="of the examples; one run each")
    parser.add_argument("--samples", type=int, default=5, help="chains of thought of self_consistency")
    parser.add_argument("--orders", type=int, default=1, help="ask each question with its options in so many orders")
    parser.add_argument(
        "--contamination",
        type=Path,
        metavar="CORPUS",
        help="look the questions up in training files: a RUN, a prefix of token files, JSON Lines, a folder of them",
    )
    parser.add_argument("--limit", type=int, help="only the first questions of each task")
    parser.add_argument("--truncate", choices=("left",), help="cut prompts that are too long; else they count as wrong")
    parser.add_argument("--seed", type=int, default=0, help="of sampled answers")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences that are written at the same time")
    parser.add_argument("--max-length", type=int, help="tokens that the model reads at most; default: its positions")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages; further ranks share the questions")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--base", help="of adapters, where it is no longer where they were trained")
    parser.add_argument("--quantize", choices=("none", "int8", "nf4"), help="hold the matrices in 8 or 4 bit")
    return parser
