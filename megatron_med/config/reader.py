"""Reads YAML into dataclasses and collects every fault: unknown keys, missing ones, values of the wrong kind."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from megatron_med.config.strict_yaml import MisleadingYAMLError, describe_fault, parse_yaml
from megatron_med.errors import ConfigError

T = TypeVar("T")

PATH = {"path": True}
"""Metadata of a dataclass field that holds a path, or several: ``~`` and ``${NAME}`` are expanded when it is read."""

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file.

    Args:
        path: of the file.
        what: it is, for the message: configuration file, recipe.

    Raises:
        ConfigError: there is no such file, or it is not YAML.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: give the path of a YAML file.")
    if not path.is_file():
        raise ConfigError(f"There is no {what} {path}. Give the path of a YAML file.")
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except MisleadingYAMLError as error:
        raise ConfigError(f"{path}, {describe_fault(error)}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {describe_fault(error)}. Correct that line.") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply to be a {what}. Correct it.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Correct it.") from error
    except OSError as error:
        raise ConfigError(f"The {what} {path} cannot be read: {error.strerror}.") from error


def expand_path(text: str) -> str:
    """``~`` and ``${NAME}`` as the shell replaces them; a pair ``A,B`` of files each.

    Raises:
        ValueError: says which variable is not set, or that there is no such home folder.
    """
    expanded = ",".join(map(os.path.expanduser, os.path.expandvars(text).split(",")))
    unset = re.search(r"\$\{[^}]*\}|\$[A-Za-z_]\w*", expanded)
    if unset:
        raise ValueError(f"the environment has no {unset[0]}")
    if expanded.startswith("~"):
        raise ValueError("there is no such home folder")
    return expanded


class Reader:
    """Makes dataclasses of plain values.

    Args:
        known: names of all options as they are written out, to suggest one for a misspelt key.
        when_missing, when_unknown: added to the message of a missing option, and of one that is like no other.

    Attributes:
        faults: what was wrong so far.
    """

    def __init__(self, known: Sequence[str] = (), when_missing: str = "", when_unknown: str = "") -> None:
        self._known = list(known)
        self._when_missing = when_missing
        self._when_unknown = when_unknown
        self.faults: list[str] = []

    def read(self, cls: type[T], value: Any, where: str = "") -> T | None:
        """An object of ``cls``; None where something is wrong.

        Args:
            cls: a dataclass.
            value: names with values.
            where: the name of the section, for messages.
        """
        before = len(self.faults)
        hints = typing.get_type_hints(cls)
        prefix = f"{where}." if where else ""
        if not isinstance(value, dict):
            self._refuse(where or "the file", value, f"keys with values: {', '.join(hints)}")
            return None
        for key in value:
            if key not in hints:
                name = f"{prefix}{key}"
                close = _closest(name, [*(prefix + hint for hint in hints), *self._known])
                advice = f": did you mean {close}?" if close else f".{self._when_unknown}"
                self.faults.append(f"{name} is not an option{advice}")
        given: dict[str, Any] = {}
        for item in dataclasses.fields(cls):  # type: ignore[arg-type]
            name, hint = f"{prefix}{item.name}", hints[item.name]
            if item.name in value:
                given[item.name] = self._value(hint, value[item.name], name)
                if item.metadata.get("path"):
                    given[item.name] = self._expanded(given[item.name], name)
            elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                if dataclasses.is_dataclass(hint):
                    self.read(typing.cast(type, hint), {}, name)  # tells what is missing in it
                else:
                    self.faults.append(f"{name} is missing{self._when_missing}.")
        # What follows from other fields is computed when it is made: not from faulty ones.
        return cls(**given) if len(self.faults) == before else None

    def _expanded(self, value: Any, where: str) -> Any:
        if isinstance(value, list):
            return [self._expanded(item, f"{where}[{index}]") for index, item in enumerate(value)]
        if not isinstance(value, str):
            return value  # null, or a fault that is told already
        try:
            return expand_path(value)
        except ValueError as error:
            self.faults.append(f"{where} is '{value}': {error}. Write the path out, or set it.")
            return value

    def _value(self, hint: Any, value: Any, where: str) -> Any:
        """``value`` as the type ``hint`` says."""
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if origin is Literal:
            if value not in inner:
                self._refuse(where, value, f"one of {', '.join(map(str, inner))}")
            return value
        if origin in (typing.Union, types.UnionType):
            return None if value is None else self._value(inner[0], value, where)
        if dataclasses.is_dataclass(hint):
            return self.read(typing.cast(type, hint), value, where)
        if origin is dict:
            return self._dict(inner[1], value, where)
        if origin in (list, tuple):
            return self._list(hint, value, where)
        return self._scalar(hint, value, where)

    def _dict(self, hint: Any, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._refuse(where, value, "names with values")
            return {}
        return {str(key): self._value(hint, item, f"{where}.{key}") for key, item in value.items()}

    def _list(self, hint: Any, value: Any, where: str) -> Any:
        inner = typing.get_args(hint)
        if isinstance(value, str) and inner[0] is str:
            value = [value]  # one file stands for a list of one
        if not isinstance(value, (list, tuple)):
            fields = dataclasses.fields(inner[0]) if dataclasses.is_dataclass(inner[0]) else ()
            items = f" of keys with values: [{{{', '.join(f'{item.name}: ...' for item in fields)}}}]" if fields else ""
            self._refuse(where, value, f"a list{items}")
            return value
        if typing.get_origin(hint) is tuple:
            if len(value) != len(inner):
                self._refuse(where, value, f"{len(inner)} values")
            return tuple(self._value(inner[0], item, f"{where}[{index}]") for index, item in enumerate(value))
        return [self._value(inner[0], item, f"{where}[{index}]") for index, item in enumerate(value)]

    def _scalar(self, hint: Any, value: Any, where: str) -> Any:
        if hint is Any or (isinstance(value, hint) and not (hint in (int, float) and isinstance(value, bool))):
            return value
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if hint in (int, float) and isinstance(value, str):
            with suppress(ValueError):
                return hint(value)  # YAML takes 1e-3 for text
        if hint is bool and value in ("true", "false"):
            return value == "true"
        self._refuse(where, value, _KINDS.get(hint, str(hint)))
        return value

    def _refuse(self, where: str, value: Any, expected: str) -> None:
        self.faults.append(f"{where} is {'null' if value is None else repr(value)}: expected {expected}.")


def _closest(key: str, names: Sequence[str]) -> str | None:
    """The name that was meant: one that is spelt alike, or ends alike in another section."""
    last = key.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.75)
    close = close or [name for name in names if name.rsplit(".", 1)[-1] == last]
    return close[0] if close else None
