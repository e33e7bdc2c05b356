"""Reads JSONL text records, each with the file and line it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_med.errors import DataError


@dataclass(frozen=True)
class Line:
    """One raw line of a file; lines end at ``\\n`` only."""

    file: Path
    number: int
    content: bytes

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}"


class BadLine(ValueError):
    """Why a line holds no usable text."""


def read_lines(files: Sequence[Path]) -> Iterator[Line]:
    """Every line of every file; blank last lines are left out."""
    for file in files:
        with file.open("rb") as stream:
            for number, content in enumerate(stream, start=1):
                if content.strip():
                    yield Line(file, number, content)


def text_of(line: Line, key: str) -> str:
    """The text of a record.

    Raises:
        BadLine: not UTF-8, not JSON, no such key, not a string, or empty.
    """
    try:
        record = json.loads(line.content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine(f"invalid UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise BadLine(f"broken JSON at column {error.colno} ({error.msg})") from error
    except RecursionError as error:
        raise BadLine("JSON that is nested too deeply") from error
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
    faults = [f"There is no input file {file}. Check the path." for file in files if not file.is_file()]
    if faults:
        raise DataError(faults)


def bad_line_error(place: str, reason: str) -> DataError:
    """The error for a line that cannot be used."""
    return DataError(
        f"{place}: {reason}. Mend the line, or pass --skip-bad-lines to leave such lines out and count them."
    )
