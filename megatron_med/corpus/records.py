"""Reads JSON records strictly: every fault names its file, line and field."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from megatron_med.data.compressed import LONGEST_LINE, TOO_LONG, bounded_lines, open_input
from megatron_med.errors import DataError

_NAMES = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}


Fault = Callable[[DataError], None]
"""What to do with a record that cannot be read: raise, or count and go on."""


def fail(error: DataError) -> None:
    """The fault that stops the build."""
    raise error


def read_records(path: Path, fault: Fault = fail) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every record of a JSONL file (plain, ``.gz`` or ``.zst``) with its place, ``file:line``.

    Raises:
        DataError: the file is cut short; or, unless ``fault`` goes on, a line is too long, not UTF-8, not JSON, or no
            object.
    """
    with open_input(path) as stream:
        for number, (line, length) in enumerate(bounded_lines(stream), start=1):
            if line.isspace():
                continue
            place = f"{path}:{number}"
            if length > LONGEST_LINE:
                fault(DataError(f"{place}: {TOO_LONG}. Split the record or take it out."))
                continue
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                fault(DataError(f"{place}: {_why(line, error)}. Correct the line or take it out."))
                continue
            if isinstance(record, dict):
                yield place, record
            else:
                fault(DataError(f"{place}: the record is {_name(record)}, not an object."))


def _why(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as fault:
        return f"invalid UTF-8 at byte {fault.start} of the line"
    return f"broken JSON at column {error.colno} ({error.msg})"


def text_field(record: dict[str, Any], name: str, place: str, required: bool = True) -> str:
    """A field that holds text, dots stepping into objects; "" where it is null, or absent and not required.

    Raises:
        DataError: names the field and the line.
    """
    value: Any = record
    for part in name.split("."):
        if value is None:
            break
        if not isinstance(value, dict):
            raise DataError(f"{place}: '{name}' cannot be read: '{part}' is sought in {_name(value)}.")
        if part not in value:
            if required:
                fields = ", ".join(sorted(map(str, value))[:8])
                raise DataError(f"{place}: no field '{name}' (there are: {fields}). Check the kind of this source.")
            value = None
            break
        value = value[part]
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{place}: '{name}' is {_name(value)}, not text.")
    return value


def _name(value: Any) -> str:
    return _NAMES.get(type(value), "null")
