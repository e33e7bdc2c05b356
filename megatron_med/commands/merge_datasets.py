"""Joins several token files of one tokenizer into one."""

from __future__ import annotations

from pathlib import Path

from megatron_med.commands.arguments import Parser
from megatron_med.data.merge import merge_datasets
from megatron_med.words import counted


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--input", nargs="+", type=Path, required=True, help="prefixes, in order")
    parser.add_argument("--output-prefix", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    arguments = parser.parse_args()
    documents, tokens = merge_datasets(arguments.input, arguments.output_prefix, arguments.overwrite)
    print(f"{arguments.output_prefix}: {counted(documents, 'document')}, {counted(tokens, 'token')}")
