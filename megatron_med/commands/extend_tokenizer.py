"""Adds special tokens after a tokenizer's vocabulary and writes the result as a folder."""

from __future__ import annotations

from pathlib import Path

from megatron_med.commands.arguments import Parser
from megatron_med.outputs import output_folder
from megatron_med.tokenizer.special import TOKEN_SETS, extend_tokenizer, refuse_source, tokens_of


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="a folder, a .model or tokenizer.json file, ...")
    parser.add_argument(
        "--tokens",
        nargs="+",
        required=True,
        choices=sorted(TOKEN_SETS),
        help="gap_replay: the 12 of the corpus, [bib_ref] to [/formula]; chatml: <|im_start|> and <|im_end|>; "
        "biomedlm_heads: [PAD], [CLS] and [SEP]; biomedlm_summary: [PAD] and <|startoftext|>",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    arguments = parser.parse_args()
    tokens = tokens_of(arguments.tokens)
    refuse_source(arguments.tokenizer, arguments.output)
    with output_folder(arguments.output, arguments.overwrite) as folder:
        size = extend_tokenizer(arguments.tokenizer, tokens, folder)
    print(f"{arguments.output}: {size:,} pieces; {tokens[0]} is {size - len(tokens)}, {tokens[-1]} is {size - 1}")
