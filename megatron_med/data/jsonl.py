"""Reads JSONL text records, each with the file and line it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_med.data.compressed import LONGEST_LINE, TOO_LONG, bounded_lines, is_compressed, open_input, skip_line
from megatron_med.errors import ConfigError, DataError

_SKIP = 1 << 22


@dataclass(frozen=True)
class Line:
    """One raw line of a file; lines end at ``\\n`` only.

    Attributes:
        offset: bytes of the decompressed file in front of it.
        content: the line with its end; of a line longer than LONGEST_LINE the beginning.
        end: offset after the whole line.
    """

    file: Path
    offset: int
    content: bytes
    end: int

    @property
    def place(self) -> str:
        """``file:line``; counted when it is asked for."""
        return place_of(self.file, self.offset)


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count`` of the input: a run of whole lines, about equal shares of the bytes on disk.

    The parts in order are the whole input. A compressed file cannot be entered in the middle: it belongs to one part.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """A shard from ``i/n``, counted from 0.

        Raises:
            ConfigError: it is not of that form, or i is not below n.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise ConfigError(f"--shard is '{text}': I/N with I from 0 to N - 1 is needed, such as 0/8 to 7/8.")
        return cls(int(index), int(count))


@dataclass(frozen=True)
class Span:
    """Lines of one file that begin at ``start`` or later and before ``stop``; None: to the end."""

    file: Path
    start: int
    stop: int | None


def place_of(file: Path, offset: int) -> str:
    """``file:line`` of the line that begins at an offset."""
    number, left = 1, offset
    with open_input(file) as stream:
        while left and (chunk := stream.read(min(left, _SKIP))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return f"{file}:{number}"


def spans_of(files: Sequence[Path], shard: Shard) -> list[Span]:
    """What a shard reads of each file."""
    sizes = [file.stat().st_size for file in files]
    total, begin = sum(sizes), 0
    low, high = total * shard.index // shard.count, total * (shard.index + 1) // shard.count
    spans = []
    for file, size in zip(files, sizes, strict=True):
        if is_compressed(file):
            if low <= begin < high:
                spans.append(Span(file, 0, None))
        elif begin < high and begin + size > low:
            spans.append(Span(file, max(0, low - begin), high - begin if begin + size > high else None))
        begin += size
    return spans


def read_lines(spans: Sequence[Path | Span]) -> Iterator[Line]:
    """Every line of every file or part of one; blank lines are left out."""
    for item in spans:
        span = Span(item, 0, None) if isinstance(item, Path) else item
        with open_input(span.file) as stream:
            offset = _first_line(stream, span.start, seekable=not is_compressed(span.file))
            for content, length in bounded_lines(stream):
                if span.stop is not None and offset >= span.stop:
                    break
                if not content.isspace():
                    yield Line(span.file, offset, content, offset + length)
                offset += length


def _first_line(stream: BinaryIO, start: int, seekable: bool) -> int:
    """Moves to the first line that begins at ``start`` or later, and returns where that is."""
    if start == 0:
        return 0
    if seekable:
        stream.seek(start - 1)
        return start - 1 + skip_line(stream)
    left = start - 1
    while left and (chunk := stream.read(min(left, _SKIP))):
        left -= len(chunk)
    return start - 1 + skip_line(stream)


class BadLine(ValueError):
    """Why a line holds no usable text."""


def content_of(line: Line) -> Any:
    """The JSON of a line.

    Raises:
        BadLine: too long, not UTF-8, or not JSON.
    """
    if line.end - line.offset > LONGEST_LINE:
        raise BadLine(TOO_LONG)
    try:
        return json.loads(line.content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine(f"invalid UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise BadLine(f"broken JSON at column {error.colno} ({error.msg})") from error
    except ValueError as error:  # int() takes 4,300 digits
        raise BadLine("a number of thousands of digits") from error
    except RecursionError as error:
        raise BadLine("JSON that is nested too deeply") from error


def text_of(line: Line, key: str) -> str:
    """The text of a record.

    Raises:
        BadLine: as ``content_of``; no such key, not a string, or empty.
    """
    record = content_of(line)
    if not isinstance(record, dict) or key not in record:
        raise BadLine(f"no key '{key}'")
    text = record[key]
    if not isinstance(text, str):
        raise BadLine(f"'{key}' is {type(text).__name__}, not text")
    if not text.strip():
        raise BadLine("empty document")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLine("half of a surrogate pair, which is no character") from error
    return text


def check_inputs(files: Sequence[Path]) -> None:
    """Raises DataError with every input file that is missing."""
    faults = [
        f"{file} is a folder: give its files." if file.is_dir() else f"There is no input file {file}. Check the path."
        for file in files
        if not file.is_file()
    ]
    if faults:
        raise DataError(faults)


def bad_line_error(place: str, reason: str, option: str = "--skip-bad-lines") -> DataError:
    """The error for a line that cannot be used."""
    return DataError(f"{place}: {reason}. Correct it, or pass {option} to leave such records out and count them.")
