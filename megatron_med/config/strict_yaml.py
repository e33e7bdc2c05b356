"""YAML without its traps: a key twice, numbers that mean something else than they look like."""

from __future__ import annotations

import re
from typing import Any

import yaml

_LOOKS_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_EXPONENT = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+")
_WHOLE_EXPONENT = re.compile(r"([-+]?[0-9]+)[eE]\+?([0-9]{1,2})")


class MisleadingYAMLError(yaml.constructor.ConstructorError):
    """What YAML admits and hardly anybody means."""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1. Numbers are read as in YAML 1.2 here, where both differ they are refused."""


def parse_yaml(text: str) -> Any:
    """The content of a YAML document.

    Raises:
        MisleadingYAMLError: a key stands twice, or a number may be misread.
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, _StrictLoader)


def describe_fault(error: yaml.YAMLError) -> str:
    """What is wrong, and in which line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    return f"line {error.problem_mark.line + 1}: {error.problem}"


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    lines: dict[Any, int] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _refused("a key is a list or holds keys itself: a key is a word", key_node)
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key, line = loader.construct_object(key_node), key_node.start_mark.line + 1
        if key in lines:
            raise _refused(f"the key '{key}' stands twice, first in line {lines[key]}: leave one out", key_node)
        lines[key] = line
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


def _whole_number(loader: _StrictLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if _LOOKS_OCTAL.fullmatch(text):
        meant = text.replace("_", "").lstrip("+-0") or "0"
        raise _refused(f"{text} begins with 0, which YAML takes for an octal number: write {meant}", node)
    if ":" in text:
        raise _refused(f"{text} is a number to the base of 60 in YAML: put it in quotes", node)
    return loader.construct_yaml_int(node)


def _number(loader: _StrictLoader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node)
    if ":" in text:
        raise _refused(f"{text} is a number to the base of 60 in YAML: put it in quotes", node)
    return loader.construct_yaml_float(node)


def _with_exponent(loader: _StrictLoader, node: yaml.ScalarNode) -> int | float:
    """``1e-3`` is a number, and ``1e6`` a whole one; YAML 1.1 takes both for text."""
    text = loader.construct_scalar(node)
    whole = _WHOLE_EXPONENT.fullmatch(text)
    return int(whole[1]) * 10 ** int(whole[2]) if whole else float(text)


def _refused(fault: str, node: yaml.Node) -> yaml.YAMLError:
    return MisleadingYAMLError(None, None, fault, node.start_mark)


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _number)
_StrictLoader.add_implicit_resolver("!exponent", _EXPONENT, list("-+0123456789"))
_StrictLoader.add_constructor("!exponent", _with_exponent)
