"""Tokenizes text into the .bin/.idx files that training reads. Started again after a kill, it goes on."""

from __future__ import annotations

from pathlib import Path

from megatron_med.commands.arguments import Parser
from megatron_med.data.jsonl import Shard
from megatron_med.data.preprocess import PreprocessOptions, preprocess
from megatron_med.tokenizer.special import CORPUS_TOKENS
from megatron_med.words import counted


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--input", nargs="+", type=Path, required=True, help=".jsonl, .json, .csv, .tsv, .parquet; also .gz, .zst"
    )
    parser.add_argument("--output-prefix", type=Path, required=True, help="writes PREFIX.bin, PREFIX.idx, PREFIX.json")
    parser.add_argument(
        "--tokenizer", required=True, help="a folder, a .model or tokenizer.json file, or vocab.json,merges.txt"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document id")
    parser.add_argument("--json-key", default="text", help="field that holds the text (default: text)")
    parser.add_argument(
        "--markup",
        action="store_true",
        help="the text is of megatron-med corpus build: [bib_ref] to [/formula] are tokens. Without it they stay text",
    )
    parser.add_argument("--skip-bad-lines", action="store_true", help="leave out lines without usable text, count them")
    parser.add_argument(
        "--shard", default="0/1", metavar="I/N", help="read part I of N (from 0); megatron-med merge joins them"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    arguments = vars(parser.parse_args())
    arguments["inputs"] = arguments.pop("input")
    arguments["markup"] = CORPUS_TOKENS if arguments["markup"] else ()
    arguments["shard"] = Shard.parse(arguments["shard"])
    options = PreprocessOptions(**arguments)
    summary = preprocess(options)
    documents, words = max(1, summary.documents), max(1, summary.words)
    if summary.resumed_at:
        print(f"went on after {counted(summary.resumed_at, 'document')} of an earlier run")
    print(
        f"{options.output_prefix}: {counted(summary.documents, 'document')}, {counted(summary.tokens, 'token')}, "
        f"{summary.tokens / documents:,.1f} tokens per document, fertility {summary.tokens / words:.3f} tokens per "
        f"word, {summary.characters / max(1, summary.tokens):.2f} characters per token"
    )
    for reason, count in summary.skipped.most_common():
        print(f"left out: {counted(count, 'line')}, {reason}")
