"""Records of a file of questions in any form: JSON Lines, a JSON list, JSON by id, CSV, Parquet. No torch here."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_med.data.jsonl import BadLine, content_of, read_lines
from megatron_med.errors import DataError


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        place: file and number of the record, from 1; a line of JSON Lines.
        key: its name, where the file has its records by name.
        fields: as they are written.
    """

    place: str
    key: str
    fields: dict[str, Any]

    def need(self, *names: str) -> Any:
        """The first of these fields that is there.

        Raises:
            DataError: none of them is.
        """
        for name in names:
            if self.fields.get(name) is not None:
                return self.fields[name]
        there = ", ".join(self.fields) or "none"
        raise DataError(f"{self.place}: the field {' or '.join(names)} is missing. It has {there}.")

    def text(self, *names: str) -> str:
        """The same, as text."""
        value = self.need(*names)
        if not isinstance(value, str):
            raise DataError(f"{self.place}: the field {names[0]} is {str(value)[:40]!r}, and should be a text.")
        return value

    def number(self, *names: str) -> int:
        """The same, as a whole number."""
        value = self.need(*names)
        if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise DataError(f"{self.place}: the field {names[0]} is {str(value)[:40]!r}, and should be a whole number.")
        return value


def read_records(path: Path, header: list[str] | None = None) -> list[Record]:
    """All records of a file.

    Args:
        path: .jsonl, .json, .csv or .parquet.
        header: names of a CSV's columns, where its first line has none.

    Raises:
        DataError: the file cannot be read, or holds no record.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}. Check the path.")
    if path.suffix in (".csv", ".tsv"):
        records = list(_csv(path, header))
    else:
        records = list({".json": _json, ".parquet": _parquet}.get(path.suffix, _lines)(path))
    if not records:
        raise DataError(f"{path} holds no question: the split is empty. Get the whole file.")
    return records


def _lines(path: Path) -> Iterator[Record]:
    for line in read_lines([path]):
        try:
            yield _record(line.place, "", content_of(line))
        except BadLine as error:
            raise DataError(f"{line.place}: {error}. Get the whole file.") from error


def _json(path: Path) -> Iterator[Record]:
    """A list, or an object of objects; MedMCQA has lines under this name, too."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}). Get the whole file.") from error
    except (ValueError, RecursionError) as error:
        with path.open("rb") as file:
            first = file.readline().strip()
        if not (first.startswith(b"{") and first.endswith(b"}")):  # no JSON Lines either
            raise DataError(f"{path} is broken JSON ({error}). Get the whole file.") from error
        yield from _lines(path)
        return
    if isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        pairs = list(content.items())
    elif isinstance(content, list):
        pairs = [("", value) for value in content]
    else:
        pairs = [("", content)]
    for number, (key, value) in enumerate(pairs, 1):
        yield _record(f"{path}, record {number}", key, value)


def _csv(path: Path, header: list[str] | None) -> Iterator[Record]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}). Get the whole file, or convert it.") from error
    rows = csv.DictReader(io.StringIO(text), header, delimiter="\t" if path.suffix == ".tsv" else ",")
    for number, row in enumerate(rows, 1):
        yield _record(f"{path}, record {number}", "", {name: value for name, value in row.items() if name is not None})


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow: pip install 'megatron_med[evaluate]'.") from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file that can be read ({error}). Get the whole file.") from error
    for number, row in enumerate(rows, 1):
        yield _record(f"{path}, record {number}", "", row)


def _record(place: str, key: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{place}: it is no object with fields but {str(value)[:40]!r}. Get the whole file.")
    return Record(place, key, value)
