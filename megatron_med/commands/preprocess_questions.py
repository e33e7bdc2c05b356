"""Tokenizes question sets for heads that score: .bin/.idx files, with the labels in PREFIX.labels.bin/.idx.

    megatron-med preprocess-questions --task medqa_4options --head multiple_choice --input train.jsonl \\
        --tokenizer TOKENIZER --output-prefix data/medqa

Each option of a question becomes "question[SEP] option[SEP]"; a text to classify "context[SEP]question[SEP]", as
BioMedLM's heads read them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_med.commands.arguments import Parser
from megatron_med.config.schema import CLASSIFICATION, MULTIPLE_CHOICE
from megatron_med.errors import ConfigError
from megatron_med.evaluate.catalogue import TEST, TRAIN, task_names


def main() -> None:
    arguments = _parser().parse_args()
    from megatron_med.evaluate.preprocess_questions import QuestionOptions, preprocess_questions

    fields = vars(arguments) | {"labels": tuple(arguments.labels)}
    if arguments.labels and arguments.head == MULTIPLE_CHOICE:
        raise ConfigError("--labels is given, and --head is multiple_choice: its options are the labels. Leave it out.")
    written = preprocess_questions(QuestionOptions(**fields))
    named = f", labels {', '.join(written.form.labels)}" if written.form.labels else ""
    print(
        f"{arguments.output_prefix}: {written.questions:,} questions, {written.sequences:,} sequences, "
        f"{written.tokens:,} tokens{named}"
    )
    print(f"the longest question has {written.longest:,} tokens: data.sequence_length must be at least that")
    if written.cut:
        print(f"{written.cut:,} sequences are cut to {arguments.max_length:,} tokens")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--task", required=True, choices=task_names(), help="what the file is; see megatron-med evaluate --list"
    )
    parser.add_argument("--input", type=Path, required=True, help="the file")
    parser.add_argument("--split", choices=(TRAIN, TEST), default=TRAIN, help="where a file holds both (default train)")
    parser.add_argument("--head", required=True, choices=(CLASSIFICATION, MULTIPLE_CHOICE))
    parser.add_argument("--tokenizer", required=True, help="a folder, a .model or tokenizer.json file, or a pair")
    parser.add_argument("--output-prefix", type=Path, required=True, help="PREFIX of the files")
    parser.add_argument("--labels", nargs="+", default=[], help="of a classification (default: the file's options)")
    parser.add_argument("--separator", default="[SEP]", help="one token behind both parts; '' for none (default [SEP])")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a sequence (default 512)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    return parser
