"""Tokenizes instruction data into .bin/.idx files, with the tokens that are trained in PREFIX.roles.bin/.idx.

Reads messages, ShareGPT, Alpaca, question and answer, MedQA, MedMCQA, PubMedQA, OpenAssistant trees, and tables whose
columns are named. Started again after a kill, it goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_med.commands.arguments import Parser
from megatron_med.data.conversations import Form, form_names, parse_columns
from megatron_med.data.jsonl import Shard
from megatron_med.data.preprocess_instructions import InstructionOptions, preprocess_instructions
from megatron_med.data.records import KINDS
from megatron_med.tokenizer.template import template_names
from megatron_med.words import counted


def main() -> None:
    options = _parse()
    summary = preprocess_instructions(options)
    if summary.resumed_at:
        print(f"went on after {summary.resumed_at:,} conversations of an earlier run")
    trained, conversations = summary.counts["trained"], max(1, summary.documents)
    print(
        f"{options.output_prefix}: {summary.documents:,} conversations, {summary.counts['answers']:,} answers, "
        f"{summary.tokens:,} tokens, {trained:,} of them trained ({100 * trained / max(1, summary.tokens):.1f} %), "
        f"{summary.tokens / conversations:,.1f} tokens per conversation"
    )
    for reason, count in summary.skipped.most_common():
        print(f"left out: {counted(count, 'record')}, {reason}")


def _parse() -> InstructionOptions:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, required=True, help=KINDS)
    parser.add_argument(
        "--template",
        required=True,
        help=f"{', '.join(template_names())}; 'tokenizer' for its own chat_template; or a .jinja file",
    )
    parser.add_argument(
        "--tokenizer", required=True, help="a folder, a .model or tokenizer.json file, or vocab.json,merges.txt"
    )
    parser.add_argument("--output-prefix", type=Path, required=True, help="PREFIX of the files")
    parser.add_argument(
        "--format", default="auto", choices=form_names(), help="of the records (default: by their fields)"
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="question=NAME",
        help="or answer, context, system: fields of a table",
    )
    parser.add_argument(
        "--answers",
        default="letter",
        choices=("letter", "option", "explained"),
        help="of multiple choice: the letter (default), the option's text, or explanation and letter",
    )
    parser.add_argument("--before", default="", metavar="TEXT", help="instruction in front of such a question")
    parser.add_argument("--behind", default="", metavar="TEXT", help="text behind it, such as 'The answer is:'")
    parser.add_argument(
        "--first-option", type=int, choices=(0, 1), help="number of MedMCQA's first option (default: from the files)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    parser.add_argument(
        "--skip-bad-records", action="store_true", help="leave out records that cannot be used, count them"
    )
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="read part I of N (from 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    arguments = parser.parse_args()
    form = Form(
        name=arguments.format,
        answers=arguments.answers,
        prompt=(arguments.before, arguments.behind),
        columns=parse_columns(arguments.columns),
        first_option=arguments.first_option,
    )
    return InstructionOptions(
        inputs=arguments.input,
        output_prefix=arguments.output_prefix,
        tokenizer=arguments.tokenizer,
        template=arguments.template,
        form=form,
        workers=arguments.workers,
        skip_bad_records=arguments.skip_bad_records,
        shard=Shard.parse(arguments.shard),
        overwrite=arguments.overwrite,
    )
