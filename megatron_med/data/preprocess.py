"""Turns JSONL text into token files, on many processes. A killed run goes on where it stopped."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_med.data.indexed import smallest_dtype, token_paths
from megatron_med.data.indexed_writer import IndexedDatasetWriter
from megatron_med.data.jsonl import (
    BadLine,
    Line,
    Shard,
    Span,
    bad_line_error,
    check_inputs,
    place_of,
    read_lines,
    spans_of,
    text_of,
)
from megatron_med.data.sources import side_file, write_side_file
from megatron_med.errors import ConfigError, DataError
from megatron_med.outputs import refuse_existing
from megatron_med.tokenizer import Tokenizer, load_tokenizer

_BYTES_PER_TASK = 1 << 18
_TASKS_PER_WORKER = 3
_SECONDS_BETWEEN_POSITIONS = 10.0


@dataclass(frozen=True)
class PreprocessOptions:
    """What ``tools/preprocess_data.py`` is asked for.

    Attributes:
        inputs: JSONL files; plain, ``.gz`` or ``.zst``.
        output_prefix: of ``.bin``, ``.idx`` and ``.json``.
        tokenizer: as ``load_tokenizer`` takes it.
        workers: processes.
        append_eod: end each document with the end-of-document id.
        json_key: field that holds the text.
        markup: added tokens that are read as such where they stand in the text; all else stays text.
        skip_bad_lines: leave out lines without usable text, and count them.
        shard: the part of the input that is read.
        overwrite: replace existing files.
    """

    inputs: list[Path]
    output_prefix: Path
    tokenizer: str
    workers: int = 1
    append_eod: bool = False
    json_key: str = "text"
    markup: tuple[str, ...] = ()
    skip_bad_lines: bool = False
    shard: Shard = field(default_factory=Shard)
    overwrite: bool = False


@dataclass
class PreprocessSummary:
    """What was written.

    Attributes:
        words: between white space.
        skipped: number of lines left out, by reason.
        resumed_at: documents that an earlier run had written.
    """

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    words: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    resumed_at: int = 0


@dataclass(frozen=True)
class _Task:
    """Some lines in a row of one span, and where the next one begins."""

    lines: list[Line]
    span: int
    end: int


@dataclass(frozen=True)
class _Encoded:
    """The documents of a task as bytes of the stored type.

    Attributes:
        faults: offset and reason of each line that holds none.
        span: number of the part of the input.
        end: offset in its file after the last line.
    """

    tokens: bytes
    sizes: npt.NDArray[np.int32]
    characters: int
    words: int
    faults: list[tuple[int, str]]
    span: int
    end: int


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
    for path in (*token_paths(prefix), side_file(prefix)):
        refuse_existing(path, options.overwrite)
    tokenizer = load_tokenizer(options.tokenizer)
    eod = _end_of_document(tokenizer, options)
    dtype = smallest_dtype(tokenizer.vocab_size)
    worker = _Worker(options.tokenizer, options.json_key, options.markup, eod, np.dtype(dtype).str)
    try:
        with IndexedDatasetWriter(prefix, dtype, _ingredients(options, tokenizer)) as writer:
            summary = _write_all(writer, worker, options)
    except BrokenProcessPool as error:
        raise DataError(
            "A worker process was killed (out of memory?). What is written stays: start the same command again."
        ) from error
    counts = {name: getattr(summary, name) for name in ("documents", "tokens", "characters", "words")}
    write_side_file(prefix, tokenizer, {**counts, "append_eod": options.append_eod, "markup": list(options.markup)})
    return summary


def _write_all(writer: IndexedDatasetWriter, worker: _Worker, options: PreprocessOptions) -> PreprocessSummary:
    """Everything after the writer's position."""
    spans = spans_of(options.inputs, options.shard)
    summary, begin = _summary_of(writer.position), (0, 0)
    if writer.position:
        summary.resumed_at = writer.documents
        begin = (writer.position["span"], writer.position["offset"])
    last = time.monotonic()
    for batch in _with_progress(_encode_all(worker, options.workers, _tasks(spans, *begin)), spans):
        if batch.faults and not options.skip_bad_lines:
            offset, fault = batch.faults[0]
            raise bad_line_error(place_of(spans[batch.span].file, offset), fault)
        writer.add_documents(batch.tokens, batch.sizes)
        summary.characters += batch.characters
        summary.words += batch.words
        summary.skipped.update(fault.split(" at ")[0] for _, fault in batch.faults)
        if time.monotonic() - last > _SECONDS_BETWEEN_POSITIONS:
            counts = {"characters": summary.characters, "words": summary.words, "skipped": summary.skipped}
            writer.save_position({"span": batch.span, "offset": batch.end, "counts": counts})
            last = time.monotonic()
    if writer.documents == 0 and options.shard.count == 1:
        raise DataError(f"{', '.join(map(str, options.inputs))}: no document with text. Nothing was written.")
    summary.documents, summary.tokens = writer.documents, writer.tokens
    return summary


def _ingredients(options: PreprocessOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that the token files depend on."""
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in options.inputs]
    named = {name: getattr(options, name) for name in ("append_eod", "json_key", "markup", "skip_bad_lines")}
    return {"inputs": files, "tokenizer": tokenizer.describe(), "shard": asdict(options.shard), **named}


def _summary_of(position: Any) -> PreprocessSummary:
    """The counts of the run that is gone on from."""
    if position is None:
        return PreprocessSummary()
    counts = dict(position["counts"])
    return PreprocessSummary(skipped=Counter(counts.pop("skipped")), **counts)


def _end_of_document(tokenizer: Tokenizer, options: PreprocessOptions) -> int | None:
    if not options.append_eod:
        return None
    if tokenizer.eod_id is None:
        raise DataError(
            f"--append-eod: {options.tokenizer} has no end-of-document token (such as <|endoftext|> or </s>). "
            "Leave the option out, or add the token to the tokenizer."
        )
    return tokenizer.eod_id


@dataclass(frozen=True)
class _Worker:
    """What a process needs to encode."""

    tokenizer: str
    json_key: str
    markup: tuple[str, ...]
    eod: int | None
    dtype: str


_started: list[tuple[_Worker, Tokenizer]] = []  # one per worker process, loaded once by the pool's initializer


def _start_worker(worker: _Worker) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _started[:] = [(worker, load_tokenizer(worker.tokenizer))]


def _encode_task(task: _Task) -> _Encoded:
    worker, tokenizer = _started[0]
    texts, faults = [], []
    for line in task.lines:
        try:
            texts.append(text_of(line, worker.json_key))
        except BadLine as error:
            faults.append((line.offset, str(error)))
    ids = tokenizer.encode_markup_batch(texts, worker.markup) if worker.markup else tokenizer.encode_batch(texts)
    if worker.eod is not None:
        for document in ids:
            document.append(worker.eod)
    sizes = np.fromiter(map(len, ids), np.int32, len(ids))
    stored = np.fromiter(itertools.chain.from_iterable(ids), worker.dtype, int(sizes.sum(dtype=np.int64)))
    words = sum(len(text.split()) for text in texts)
    return _Encoded(stored.tobytes(), sizes, sum(map(len, texts)), words, faults, task.span, task.end)


def _tasks(spans: list[Span], first: int, offset: int) -> Iterator[_Task]:
    """Lines of one span, about ``_BYTES_PER_TASK`` at a time, from an offset in span ``first`` on."""
    for number, span in enumerate(spans[first:], start=first):
        lines: list[Line] = []
        size = 0
        for line in read_lines([replace(span, start=offset) if number == first and offset else span]):
            lines.append(line)
            size += len(line.content)
            if size >= _BYTES_PER_TASK:
                yield _Task(lines, number, line.end)
                lines, size = [], 0
        if lines:
            yield _Task(lines, number, lines[-1].end)


def _encode_all(worker: _Worker, workers: int, tasks: Iterator[_Task]) -> Iterator[_Encoded]:
    """Every task's ids in the order of the input; a bounded number of tasks is in flight."""
    if workers == 1:
        _start_worker(worker)
        yield from map(_encode_task, tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_med.data.preprocess"])  # imported once, not by every worker
    waiting: deque[Future[_Encoded]] = deque()
    with ProcessPoolExecutor(workers, context, _start_worker, (worker,)) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(_encode_task, task))
                if len(waiting) >= workers * _TASKS_PER_WORKER:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _with_progress(encoded: Iterable[_Encoded], spans: list[Span]) -> Iterator[_Encoded]:
    """Passes everything on and shows how far it is, on a terminal; compressed files have no known end."""
    console = Console(stderr=True)
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    sizes = [(span.stop or span.file.stat().st_size) - span.start for span in spans]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("tokenizing", total=sum(sizes))
        done = list(itertools.accumulate(sizes, initial=0))
        for item in encoded:
            yield item
            progress.update(bar, completed=done[item.span] + item.end - spans[item.span].start)
