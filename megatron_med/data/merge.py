"""Joins token files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_med.data.indexed import IndexedDataset, token_paths
from megatron_med.data.indexed_writer import IndexedDatasetWriter
from megatron_med.data.sources import (
    read_side_file,
    recorded_tokenizer,
    refuse_token_files,
    side_file,
    write_side_file,
)
from megatron_med.errors import DataError
from megatron_med.tokenizer import describe_difference


def merge_datasets(prefixes: Sequence[Path], output: Path, overwrite: bool = False) -> tuple[int, int]:
    """Writes the documents of all prefixes, in order, into one file, and returns documents and tokens.

    Raises:
        DataError: the files differ in type or tokenizer.
        TargetExistsError: the output exists.
    """
    refuse_token_files(output, overwrite, [file for prefix in prefixes for file in token_paths(prefix)])
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    sides = [read_side_file(prefix) for prefix in prefixes]
    first = sides[0]
    for data, side in zip(datasets, sides, strict=True):
        if data.dtype != datasets[0].dtype:
            raise DataError(f"{data.prefix} stores {data.dtype}, {prefixes[0]} {datasets[0].dtype}: tokenize alike.")
        if (side is None) != (first is None) or (
            side is not None and first is not None and describe_difference(first["tokenizer"], side["tokenizer"])
        ):
            raise DataError(f"{data.prefix} was not made with the tokenizer of {prefixes[0]}: tokenize alike.")
        options = [(part or {}).get(name) for part in (first, side) for name in ("append_eod", "markup")]
        if options[:2] != options[2:]:
            raise DataError(f"{data.prefix} was not tokenized with the --append-eod and --markup of {prefixes[0]}.")
    with IndexedDatasetWriter(output, datasets[0].dtype) as writer:
        for data in datasets:
            writer.add_dataset(data)
    tokenizer = recorded_tokenizer(prefixes[0])
    if tokenizer is not None and first is not None:
        counts: dict[str, Any] = {"documents": writer.documents, "tokens": writer.tokens}
        for name in ("characters", "words"):
            parts = [side.get(name) if side else None for side in sides]
            if None not in parts:
                counts[name] = sum(part for part in parts if part is not None)
        same: dict[str, Any] = {name: first[name] for name in ("append_eod", "markup") if name in first}
        write_side_file(output, tokenizer, counts | same)
    elif overwrite:
        side_file(output).unlink(missing_ok=True)
    return writer.documents, writer.tokens
