"""Reads records of any kind of file: JSON lines, a JSON list, a JSON object of records, CSV, TSV and Parquet.

Whatever the file, a record comes as the JSON of one line with its place. Places in JSON lines are bytes, so that a
run can enter them anywhere; in all other files they are numbers of records.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from megatron_med.data import jsonl
from megatron_med.data.compressed import is_compressed, open_input
from megatron_med.data.jsonl import Line, Shard, Span
from megatron_med.errors import DataError

Kind = Literal["lines", "json", "csv", "tsv", "parquet"]

KINDS = ".jsonl, .json, .csv, .tsv, .parquet; all but the last also as .gz, .zst"
"""Files that are read, for help texts."""
_SNIFFED = 1 << 16
_LONGEST_CELL = 1 << 24
_ROWS = 256
"""Of a Parquet file that are in memory at the same time."""
_KINDS: dict[str, Kind] = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}


def kind_of(file: Path) -> Kind:
    """Of what kind a file is: by its name, and a ``.json`` by how it begins (many hold a record a line)."""
    name = file.with_suffix("") if is_compressed(file) else file
    if name.suffix in _KINDS:
        return _KINDS[name.suffix]
    return _json_kind(file) if name.suffix == ".json" else "lines"


def _json_kind(file: Path) -> Kind:
    with open_input(file) as stream:
        head = stream.read(_SNIFFED).lstrip()
        while head and b"\n" not in head and (more := stream.read(_SNIFFED)):
            head += more
    if not head.startswith(b"{"):
        return "json"
    try:
        first = json.loads(head.split(b"\n", 1)[0])
    except ValueError:
        return "json"  # one object over several lines
    return "json" if first and all(isinstance(value, dict) for value in first.values()) else "lines"


def spans_of(files: Sequence[Path], shard: Shard) -> list[Span]:
    """What a shard reads of each file: in JSON lines an equal share of all bytes, elsewhere of each file's records."""
    lines = [file for file in files if kind_of(file) == "lines"]
    spans = {span.file: span for span in jsonl.spans_of(lines, shard)}
    found = []
    for file in files:
        if file not in lines:
            count = _count(file)
            span = Span(file, count * shard.index // shard.count, count * (shard.index + 1) // shard.count)
            found += [span] if span.start < count * (shard.index + 1) // shard.count else []
        elif file in spans:
            found.append(spans[file])
    return found


def read_records(spans: Sequence[Span]) -> Iterator[Line]:
    """Every record of every file or part of one, in order."""
    for span in spans:
        if kind_of(span.file) == "lines":
            yield from jsonl.read_lines([span])
            continue
        parquet = kind_of(span.file) == "parquet"
        records = _parquet_records(span) if parquet else _read_all(span.file)[span.start : span.stop]
        for number, record in enumerate(records, span.start):
            content = json.dumps(record, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
            yield Line(span.file, number, content, number + 1)


def place_of(file: Path, offset: int) -> str:
    """``file:line`` or ``file, record N``, of the record at an offset."""
    return jsonl.place_of(file, offset) if kind_of(file) == "lines" else f"{file}, record {offset + 1}"


@dataclass(frozen=True)
class Units:
    """What a span's offsets mean for a progress bar: from ``start`` on, each is ``each`` bytes of ``size``."""

    start: int
    size: float
    each: float

    def bytes_up_to(self, offset: int) -> float:
        """Bytes of the span in front of an offset."""
        return (offset - self.start) * self.each


def units_of(span: Span) -> Units:
    """The units of a span."""
    size = span.file.stat().st_size
    if kind_of(span.file) == "lines":
        return Units(span.start, (span.stop or size) - span.start, 1.0)
    records = (span.stop or 0) - span.start
    return Units(span.start, float(size), size / max(1, records))


def _count(file: Path) -> int:
    """Records of a file that is no JSON lines."""
    if kind_of(file) != "parquet":
        return len(_read_all(file))
    with _parquet(file) as opened:
        return opened.metadata.num_rows


_read: dict[tuple[Path, int, int], list[dict[str, Any]]] = {}  # the file that was read last


def _read_all(file: Path) -> list[dict[str, Any]]:
    """All records of a file that is neither JSON lines nor Parquet; the last file stays in memory."""
    state = file.stat()
    key = (file, state.st_size, state.st_mtime_ns)
    if key not in _read:
        records = _from_text(file, kind_of(file))
        _read.clear()
        _read[key] = records
    return _read[key]


def _from_text(file: Path, kind: Kind) -> list[dict[str, Any]]:
    with open_input(file) as stream:
        try:
            text = stream.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 (byte {error.start}): convert it.") from error
    return _from_json(file, text) if kind == "json" else _from_csv(file, text, "\t" if kind == "tsv" else ",")


def _from_json(file: Path, text: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno} is broken JSON ({error.msg}): write it again.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is JSON that cannot be read ({error}): write it again.") from error
    if isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        return [{"id": key, **value} for key, value in content.items()]
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        content = [content]
    bad = next((number for number, record in enumerate(content, start=1) if not isinstance(record, dict)), None)
    if bad is not None:
        raise DataError(f"{file}, record {bad} is {type(content[bad - 1]).__name__}: an object with fields is needed.")
    return content


def _from_csv(file: Path, text: str, delimiter: str) -> list[dict[str, Any]]:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        records = list(reader)
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num} is broken CSV ({error}): correct the line.") from error
    for number, record in enumerate(records, start=1):
        if None in record or None in record.values():
            raise DataError(
                f"{file}, record {number} has another number of cells than the first line has names: correct it."
            )
    return records


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    """Opens a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{file} needs pyarrow: pip install 'megatron_med[parquet]'.") from error
    if is_compressed(file):
        raise DataError(f"{file} is compressed twice: Parquet compresses itself. Unpack it.")
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            yield opened
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is no Parquet file that can be read ({error}): fetch it again.") from error


def _parquet_records(span: Span) -> Iterator[dict[str, Any]]:
    """Records of a part of a Parquet file; a batch of rows is in memory at a time."""
    with _parquet(span.file) as opened:
        groups, begin, before = [], 0, 0
        for group in range(opened.num_row_groups):
            rows = opened.metadata.row_group(group).num_rows
            if begin + rows > span.start and (span.stop is None or begin < span.stop):
                groups.append(group)
            elif not groups:
                before = begin + rows
            begin += rows
        rows_of_groups = (row for batch in opened.iter_batches(_ROWS, row_groups=groups) for row in batch.to_pylist())
        stop = None if span.stop is None else span.stop - before
        yield from islice(rows_of_groups, span.start - before, stop)
