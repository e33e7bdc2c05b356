"""Trains a byte-level BPE tokenizer on text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_med.commands.arguments import Parser
from megatron_med.data.jsonl import BadLine, Shard, bad_line_error, check_inputs, text_of
from megatron_med.data.records import place_of, read_records, spans_of
from megatron_med.errors import DataError
from megatron_med.outputs import output_folder, refuse_existing
from megatron_med.tokenizer.train import save_tokenizer, train_bpe
from megatron_med.words import counted


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--input", nargs="+", type=Path, required=True, help=".jsonl, .json, .csv, .tsv, .parquet; also .gz, .zst"
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, <|endoftext|> included")
    parser.add_argument("--output", type=Path, required=True, help="folder for tokenizer.json")
    parser.add_argument("--min-frequency", type=int, default=2, help="pairs seen less often stay apart (default 2)")
    parser.add_argument("--json-key", default="text", help="field that holds the text (default: text)")
    parser.add_argument("--skip-bad-lines", action="store_true", help="leave out lines without usable text, count them")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    arguments = parser.parse_args()
    check_inputs(arguments.input)
    refuse_existing(arguments.output, arguments.overwrite)
    skipped: list[str] = []
    texts = _texts(arguments.input, arguments.json_key, arguments.skip_bad_lines, skipped)
    tokenizer = train_bpe(texts, arguments.vocab_size, arguments.min_frequency, show_progress=sys.stderr.isatty())
    with output_folder(arguments.output, arguments.overwrite) as folder:
        save_tokenizer(tokenizer, folder)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    print(f"{arguments.output}: {size:,} pieces")
    if size < arguments.vocab_size:
        print(
            f"the text has pairs for {size:,} pieces only, not {arguments.vocab_size:,}: set model.vocab_size: {size}"
        )
    if skipped:
        print(f"left out: {counted(len(skipped), 'line')}, the first is {skipped[0]}")


def _texts(files: list[Path], key: str, skip: bool, skipped: list[str]) -> Iterator[str]:
    found = False
    for line in read_records(spans_of(files, Shard())):
        try:
            yield text_of(line, key)
            found = True
        except BadLine as error:
            if not skip:
                raise bad_line_error(place_of(line.file, line.offset), str(error)) from error
            skipped.append(f"{place_of(line.file, line.offset)} ({error})")
    if not found:
        raise DataError(f"{', '.join(map(str, files))}: no document with text. Nothing was written.")
