"""Encodes records into token files, on many processes and in their order. A killed run goes on where it stopped."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_med.data.indexed_writer import ColumnsWriter
from megatron_med.data.jsonl import Line, Span, bad_line_error
from megatron_med.data.records import place_of, read_records, units_of
from megatron_med.errors import ConfigError, DataError

_BYTES_PER_TASK = 1 << 18
_TASKS_PER_WORKER = 3
_SECONDS_BETWEEN_POSITIONS = 10.0


@dataclass(frozen=True)
class Encoded:
    """What some records became.

    Attributes:
        columns: for each of the files that are written, all documents as bytes of its type.
        sizes: tokens of each document.
        counts: sums over the documents, by name.
        faults: offset and reason of each record that cannot be used.
    """

    columns: tuple[bytes, ...]
    sizes: npt.NDArray[np.int32]
    counts: dict[str, int]
    faults: list[tuple[int, str]]


class Encoding(Protocol):
    """What every process is given; it loads the rest itself."""

    def load(self) -> Callable[[Sequence[Line]], Encoded]:
        """The function that encodes records, called once in every process."""
        ...


@dataclass
class Summary:
    """What was written.

    Attributes:
        counts: sums over all documents, by name.
        skipped: number of records left out, by reason.
        resumed_at: documents that an earlier run had written.
    """

    documents: int = 0
    tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    resumed_at: int = 0


@dataclass(frozen=True)
class _Task:
    """Some records in a row of one span, and where the next one begins."""

    lines: list[Line]
    span: int
    end: int


@dataclass(frozen=True)
class _Done:
    encoded: Encoded
    span: int
    end: int


def write_encoded(
    writer: ColumnsWriter,
    encoding: Encoding,
    spans: Sequence[Span],
    workers: int,
    skip_faults: bool,
    skip_option: str,
) -> Summary:
    """Encodes everything after the writer's position.

    Args:
        writer: of the files, open.
        encoding: from records to documents.
        spans: the input.
        workers: processes.
        skip_faults: leave records out that cannot be used, and count them.
        skip_option: what a user sets for that.

    Raises:
        DataError: a record cannot be used; file and number are named.
    """
    if workers < 1:
        raise ConfigError(f"--workers is {workers}: at least 1 process is needed.")
    summary, begin = _summary_of(writer)
    last = time.monotonic()
    try:
        for done in _with_progress(_encode_all(encoding, workers, _tasks(spans, *begin)), spans):
            encoded = done.encoded
            if encoded.faults and not skip_faults:
                offset, fault = encoded.faults[0]
                raise bad_line_error(place_of(spans[done.span].file, offset), fault, skip_option)
            writer.add_documents(encoded.columns, encoded.sizes)
            summary.counts.update(encoded.counts)
            summary.skipped.update(fault.split(" at ")[0] for _, fault in encoded.faults)
            if time.monotonic() - last > _SECONDS_BETWEEN_POSITIONS:
                counts = {**summary.counts, "skipped": summary.skipped}
                writer.save_position({"span": done.span, "offset": done.end, "counts": counts})
                last = time.monotonic()
    except BrokenProcessPool as error:
        raise DataError(
            "A worker process was killed (out of memory?). What is written stays: start the same command again."
        ) from error
    summary.documents, summary.tokens = writer.documents, writer.tokens
    return summary


def _summary_of(writer: ColumnsWriter) -> tuple[Summary, tuple[int, int]]:
    """The counts of the run that is gone on from, and the span and offset where it stopped."""
    position = writer.position
    if position is None:
        return Summary(), (0, 0)
    counts = dict(position["counts"])
    skipped: Counter[str] = Counter(counts.pop("skipped"))
    summary = Summary(counts=Counter(counts), skipped=skipped, resumed_at=writer.documents)
    return summary, (position["span"], position["offset"])


_started: list[Callable[[Sequence[Line]], Encoded]] = []  # one per worker process, made by the pool's initializer


def _start_worker(encoding: Encoding) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _started[:] = [encoding.load()]


def _encode_task(task: _Task) -> _Done:
    return _Done(_started[0](task.lines), task.span, task.end)


def _tasks(spans: Sequence[Span], first: int, offset: int) -> Iterator[_Task]:
    """Records of one span, about ``_BYTES_PER_TASK`` at a time, from an offset in span ``first`` on."""
    for number, span in enumerate(spans[first:], start=first):
        lines: list[Line] = []
        size = 0
        for line in read_records([replace(span, start=offset) if number == first and offset else span]):
            lines.append(line)
            size += len(line.content)
            if size >= _BYTES_PER_TASK:
                yield _Task(lines, number, line.end)
                lines, size = [], 0
        if lines:
            yield _Task(lines, number, lines[-1].end)


def _encode_all(encoding: Encoding, workers: int, tasks: Iterator[_Task]) -> Iterator[_Done]:
    """Every task's documents in the order of the input; a bounded number of tasks is in flight."""
    if workers == 1:
        _start_worker(encoding)
        yield from map(_encode_task, tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([type(encoding).__module__])  # imported once, not by every worker
    waiting: deque[Future[_Done]] = deque()
    with ProcessPoolExecutor(workers, context, _start_worker, (encoding,)) as pool:
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


def _with_progress(items: Iterable[_Done], spans: Sequence[Span]) -> Iterator[_Done]:
    """Passes everything on and shows how far it is, on a terminal; compressed files have no known end."""
    console = Console(stderr=True)
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    units = [units_of(span) for span in spans]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("tokenizing", total=sum(unit.size for unit in units))
        done = list(itertools.accumulate((unit.size for unit in units), initial=0))
        for item in items:
            yield item
            unit = units[item.span]
            progress.update(bar, completed=done[item.span] + unit.bytes_up_to(item.end))
