"""Goes on from prompts, or converses, with a trained checkpoint or a Hugging Face folder.

    megatron-med generate --checkpoint RUN --prompt "Patients with heart failure"
    megatron-med generate --checkpoint RUN --interactive
    megatron-med generate --checkpoint RUN --input prompts.jsonl --output answers.jsonl
    megatron-med generate --nproc-per-node 4 -- --tensor 2 --pipeline 2 --checkpoint RUN --prompt "..."

A file of prompts has one object a line: {"prompt": text}, {"prompt_ids": [...]} or {"messages": [...]}. The answers
come in the same order, and the same command goes on after a kill. Ranks beyond --tensor x --pipeline share the prompts.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_med.commands.arguments import Parser
from megatron_med.errors import ConfigError
from megatron_med.inference.answers import (
    AnswerFile,
    Prompt,
    answered,
    encode_prompt,
    read_prompts,
    requests_of,
    rounds,
)
from megatron_med.inference.engine import Engine
from megatron_med.inference.grid import join_grid
from megatron_med.inference.interactive import converse
from megatron_med.inference.load import Loaded, Settings, load_model
from megatron_med.inference.request import Answer, Request, row_seed
from megatron_med.inference.sampling import Sampling
from megatron_med.model.build import DTYPES
from megatron_med.parallel.collectives import gather_objects, on_first_rank
from megatron_med.parallel.context import ParallelContext
from megatron_med.progress import progress_bar

_PATIENCE = timedelta(hours=2)
"""A replica may have long answers to write while the others wait."""
_ROUND = 4
"""Prompts that each row is dealt before the replicas meet to write answers."""


def main() -> None:
    arguments = _parser().parse_args()
    _check(arguments)
    try:
        shares = arguments.input is not None
        context = join_grid(arguments.tensor, arguments.pipeline, replicas=shares, timeout=_PATIENCE)
        _generate(arguments, context)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="RUN, RUN/checkpoints, one step, or a Hugging Face folder")
    parser.add_argument("--base", help="of adapters, where it is no longer where they were trained")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to go on from")
    prompt.add_argument("--prompt-ids", nargs="+", type=int, help="token ids, for a checkpoint without a tokenizer")
    prompt.add_argument("--interactive", action="store_true", help="converse on the terminal")
    prompt.add_argument("--input", type=Path, help="file of prompts, JSONL")
    parser.add_argument("--output", type=Path, help="file of answers, JSONL; belongs to --input")
    parser.add_argument("--overwrite", action="store_true", help="begin the file of answers anew")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="only the k most likely tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="only tokens whose probabilities add up to p")
    parser.add_argument("--min-p", type=float, default=0.0, help="only tokens with this share of the best probability")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: earlier tokens are less likely")
    parser.add_argument("--frequency-penalty", type=float, default=0.0, help="taken from a logit for each earlier use")
    parser.add_argument("--no-repeat-ngram-size", type=int, default=0, help="no n tokens in a row come twice")
    parser.add_argument("--beams", type=int, default=1, help="hypotheses of a beam search; 1: none")
    parser.add_argument("--length-penalty", type=float, default=1.0, help="above 1: longer beams are better")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences that are written at the same time")
    parser.add_argument(
        "--seed", type=int, default=0, help="each prompt draws from its own, made of this and its number"
    )
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--quantize",
        choices=("none", "int8", "nf4"),
        help="hold the matrices in 8 or 4 bit; default: as they were while adapters were trained",
    )
    parser.add_argument("--add-bos", action="store_true", help="begin with the tokenizer's begin-of-sequence id")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    faults = [
        f"--{name} is {value}: it must be at least 1."
        for name, value in (("max-new-tokens", arguments.max_new_tokens), ("batch-size", arguments.batch_size))
        if value < 1
    ]
    if (arguments.input is None) != (arguments.output is None):
        faults.append("--input and --output belong together: a file of prompts, and one for their answers.")
    paths = [path.resolve() for path in (arguments.input, arguments.output) if path is not None]
    if len(set(paths)) < len(paths):
        faults.append("--input and --output are one file: the answers would take the place of the prompts.")
    if arguments.beams > 1 and (arguments.interactive or arguments.stop):
        faults.append("--beams writes whole answers that end with an end token: leave out --interactive and --stop.")
    if faults:
        raise ConfigError(faults)


def _generate(arguments: argparse.Namespace, context: ParallelContext) -> None:
    sampling = Sampling(
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        arguments.min_p,
        arguments.repetition_penalty,
        arguments.frequency_penalty,
        arguments.no_repeat_ngram_size,
        arguments.beams,
        arguments.length_penalty,
    )
    for text in arguments.stop:
        _utf8(text)
    settings = Settings(DTYPES[arguments.precision], None, arguments.base, arguments.quantize)
    loaded = load_model(arguments.checkpoint, context, settings)
    engine = Engine(loaded.model, sampling, loaded.stopping(arguments.stop), arguments.batch_size)
    if arguments.interactive:
        converse(loaded, engine, arguments.max_new_tokens, arguments.seed, arguments.add_bos)
    elif arguments.input is not None:
        _answer_file(arguments, loaded, engine)
    else:
        _answer_one(arguments, loaded, engine)


def _answer_one(arguments: argparse.Namespace, loaded: Loaded, engine: Engine) -> None:
    ids = arguments.prompt_ids or encode_prompt(_utf8(arguments.prompt), loaded, arguments.add_bos)
    request = Request(ids, arguments.max_new_tokens, row_seed(arguments.seed, 0))
    loaded.check(request)
    (answer,) = engine.answers([request])
    if not loaded.model.context.world.is_first:
        return
    if loaded.tokenizer is None:
        print(" ".join(map(str, [*ids, *answer.tokens])))
    elif answer.end == "stop_string":
        print(loaded.tokenizer.decode(ids) + answer.text)
    else:
        print(loaded.tokenizer.decode([*ids, *answer.tokens]))


def _utf8(prompt: str) -> str:
    try:
        return os.fsencode(prompt).decode("utf-8")  # whatever the locale has made of it
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt is not UTF-8 text (byte {error.start}): write it in UTF-8.") from error


def _answer_file(arguments: argparse.Namespace, loaded: Loaded, engine: Engine) -> None:
    context = loaded.model.context
    prompts = read_prompts(arguments.input, loaded, arguments.add_bos, arguments.max_new_tokens)
    files: list[AnswerFile] = []  # on rank 0 alone

    def begin() -> int:
        deciding = _deciding(arguments, loaded)
        files.append(AnswerFile(arguments.output, prompts, deciding, arguments.overwrite))
        return files[0].done

    done = on_first_rank(context, begin)
    with progress_bar("answers", len(prompts), done, shown=bool(files)) as advance:
        for answer_number, answer in _answers(arguments, loaded, engine, prompts, done):
            for file in files:
                file.add(answer_number, answered(prompts[answer_number], answer, loaded.tokenizer is not None))
                advance()
    for file in files:
        file.close()


def _answers(
    arguments: argparse.Namespace, loaded: Loaded, engine: Engine, prompts: Sequence[Prompt], done: int
) -> Iterator[tuple[int, Answer]]:
    """Answers to the prompts from ``done`` on, with their numbers. Replicas share out a round of prompts at a time."""
    replicas = loaded.model.context.batch
    size = len(prompts) if replicas.size == 1 else arguments.batch_size * replicas.size * _ROUND
    for numbers in rounds(len(prompts), done, max(1, size)):
        own = numbers[replicas.rank :: replicas.size]
        requests = [requests_of([prompts[n]], n, arguments.max_new_tokens, arguments.seed)[0] for n in own]
        found = ((own[answer.request], answer) for answer in engine.answers(requests))
        if replicas.size == 1:
            yield from found
        else:
            for part in gather_objects(list(found), replicas):
                yield from part


def _deciding(arguments: argparse.Namespace, loaded: Loaded) -> dict[str, Any]:
    """What the answers depend on."""
    free = {"output", "overwrite", "batch_size", "tensor", "pipeline", "prompt", "prompt_ids", "interactive", "input"}
    given = {name.replace("_", "-"): value for name, value in vars(arguments).items() if name not in free}
    return given | {"checkpoint": str(loaded.source.resolve()), "weights": loaded.fingerprint()}
