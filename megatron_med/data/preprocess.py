"""Turns JSONL text into token files, on many processes."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_med.data.indexed import IndexedDatasetWriter, smallest_dtype
from megatron_med.data.jsonl import BadLine, Line, bad_line_error, check_inputs, read_lines, text_of
from megatron_med.data.sources import side_file, write_side_file
from megatron_med.errors import ConfigError, DataError, refuse_existing
from megatron_med.tokenizer import Tokenizer, load_tokenizer

_LINES_PER_TASK = 64


@dataclass(frozen=True)
class PreprocessOptions:
    """What ``tools/preprocess_data.py`` is asked for.

    Attributes:
        inputs: JSONL files.
        output_prefix: of ``.bin``, ``.idx`` and ``.json``.
        tokenizer: as ``load_tokenizer`` takes it.
        workers: processes.
        append_eod: end each document with the end-of-document id.
        json_key: field that holds the text.
        skip_bad_lines: leave out lines without usable text, and count them.
        overwrite: replace existing files.
    """

    inputs: list[Path]
    output_prefix: Path
    tokenizer: str
    workers: int = 1
    append_eod: bool = False
    json_key: str = "text"
    skip_bad_lines: bool = False
    overwrite: bool = False


@dataclass
class PreprocessSummary:
    """What was written.

    Attributes:
        skipped: number of lines left out, by reason.
    """

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Encoded:
    """One line's ids, or why it has none."""

    place: str
    size: int
    characters: int = 0
    ids: npt.NDArray[np.int32] | None = None
    fault: str = ""


def preprocess(options: PreprocessOptions) -> PreprocessSummary:
    """Tokenizes every document in order and writes ``prefix.bin``, ``.idx`` and ``.json``.

    Raises:
        DataError: an input is missing or a line is bad (file and line number are named); nothing is written.
        TargetExistsError: the output exists.
    """
    check_inputs(options.inputs)
    if options.workers < 1:
        raise ConfigError(f"--workers is {options.workers}: at least 1 process is needed.")
    prefix = options.output_prefix
    for path in (prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx"), side_file(prefix)):
        refuse_existing(path, options.overwrite)
    tokenizer = load_tokenizer(options.tokenizer)
    eod = _end_of_document(tokenizer, options)
    summary = PreprocessSummary()
    with IndexedDatasetWriter(prefix, smallest_dtype(tokenizer.vocab_size)) as writer:
        for encoded in _with_progress(_encode_all(options), options.inputs):
            if encoded.ids is None:
                if not options.skip_bad_lines:
                    raise bad_line_error(encoded.place, encoded.fault)
                summary.skipped[encoded.fault.split(" at ")[0]] += 1
                continue
            writer.add_document(np.append(encoded.ids, eod) if eod is not None else encoded.ids)
            summary.characters += encoded.characters
        if writer.documents == 0:
            raise DataError(f"{', '.join(map(str, options.inputs))}: no document with text. Nothing was written.")
        summary.documents, summary.tokens = writer.documents, writer.tokens
    counts = {"documents": summary.documents, "tokens": summary.tokens, "append_eod": options.append_eod}
    write_side_file(prefix, tokenizer, counts)
    return summary


def _end_of_document(tokenizer: Tokenizer, options: PreprocessOptions) -> int | None:
    if not options.append_eod:
        return None
    if tokenizer.eod_id is None:
        raise DataError(
            f"--append-eod: {options.tokenizer} has no end-of-document token (such as <|endoftext|> or </s>). "
            "Leave the option out, or add the token to the tokenizer."
        )
    return tokenizer.eod_id


_worker_tokenizer: list[Tokenizer] = []  # one per worker process, loaded once by the pool's initializer


def _start_worker(tokenizer: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer[:] = [load_tokenizer(tokenizer)]


def _encode_task(task: tuple[list[Line], str]) -> list[_Encoded]:
    lines, key = task
    texts, faults = [], {}
    for index, line in enumerate(lines):
        try:
            texts.append(text_of(line, key))
        except BadLine as error:
            faults[index] = str(error)
    ids = iter(_worker_tokenizer[0].encode_batch(texts))
    lengths = iter([len(text) for text in texts])
    return [
        _Encoded(line.place, len(line.content), fault=faults[index])
        if index in faults
        else _Encoded(line.place, len(line.content), next(lengths), np.array(next(ids), dtype=np.int32))
        for index, line in enumerate(lines)
    ]


def _tasks(options: PreprocessOptions) -> Iterator[tuple[list[Line], str]]:
    lines = read_lines(options.inputs)
    while batch := list(islice(lines, _LINES_PER_TASK)):
        yield batch, options.json_key


def _encode_all(options: PreprocessOptions) -> Iterator[_Encoded]:
    """Every line's ids in the order of the input."""
    if options.workers <= 1:
        _start_worker(options.tokenizer)
        for task in _tasks(options):
            yield from _encode_task(task)
        return
    context = multiprocessing.get_context("forkserver")
    with context.Pool(options.workers, _start_worker, (options.tokenizer,)) as pool:
        for encoded in pool.imap(_encode_task, _tasks(options), chunksize=4):
            yield from encoded
        pool.close()
        pool.join()


def _with_progress(encoded: Iterable[_Encoded], inputs: Sequence[Path]) -> Iterator[_Encoded]:
    """Passes everything on and shows how far it is, on a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("tokenizing", total=sum(file.stat().st_size for file in inputs))
        for item in encoded:
            yield item
            progress.advance(task, item.size)
