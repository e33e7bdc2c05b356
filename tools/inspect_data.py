"""Shows what a token file holds: counts, lengths, the tokenizer, and single documents as text."""

from __future__ import annotations

import argparse

import numpy as np

from megatron_med.data.indexed import IndexedDataset
from megatron_med.data.sources import read_side_file, recorded_tokenizer
from megatron_med.errors import DataError, run_command
from megatron_med.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", help="PREFIX of .bin and .idx")
    parser.add_argument("--document", type=int, help="print this document's ids and text")
    parser.add_argument("--tokenizer", help="for a prefix without a side file")
    arguments = parser.parse_args()
    data = IndexedDataset(arguments.prefix)
    if arguments.document is None:
        _print_summary(data)
    else:
        _print_document(data, arguments.document, arguments.tokenizer)


def _print_summary(data: IndexedDataset) -> None:
    print(f"{data.prefix}: {len(data):,} documents, {data.token_count:,} tokens, {data.dtype.name}")
    if len(data):
        low, middle, high = np.percentile(data.sizes, [0, 50, 100]).astype(int)
        print(f"tokens per document: {low:,} to {high:,}, median {middle:,}")
    side = read_side_file(data.prefix)
    if side is None:
        print("no side file: the tokenizer is not recorded")
        return
    tokenizer = side["tokenizer"]
    print(
        f"tokenizer: {tokenizer['paths'][0]}, {tokenizer['vocab_size']:,} pieces, end of document {tokenizer['eod_id']}"
    )


def _print_document(data: IndexedDataset, document: int, override: str | None) -> None:
    if not 0 <= document < len(data):
        raise DataError(f"--document is {document}: {data.prefix} has documents 0 to {len(data) - 1}.")
    ids = data.read(document)
    print(f"document {document}: {len(ids):,} tokens")
    print(" ".join(map(str, ids[:64].tolist())) + (" ..." if len(ids) > 64 else ""))
    tokenizer = load_tokenizer(override) if override else recorded_tokenizer(data.prefix)
    if tokenizer is None:
        print("give --tokenizer to see the text")
    else:
        print(tokenizer.decode(ids.tolist()))


if __name__ == "__main__":
    run_command(main)
