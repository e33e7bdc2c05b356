"""Reads a configuration: YAML file, then ``--section.key value``, then every rule, then one error with all faults."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from megatron_med.config.presets import PRESETS
from megatron_med.config.reader import Reader, expand_path, read_yaml
from megatron_med.config.schema import Config, ModelConfig, RopeScaling
from megatron_med.config.strict_yaml import MisleadingYAMLError, parse_yaml
from megatron_med.config.validate import validate
from megatron_med.errors import ConfigError, describe_os_error

INFORMATION_FLAGS = ("-h", "--help", "--print_config")
"""Options that print something and end."""


def load_config(arguments: list[str], world_size: int, program: str = "megatron_med.train") -> Config:
    """The configuration that a command line asks for.

    Args:
        arguments: ``CONFIG.yaml`` and any number of ``--section.key value``.
        world_size: number of ranks it will run on.
        program: name shown by ``--help``.

    Raises:
        ConfigError: with every fault: unknown keys, missing ones, wrong types, broken rules.
        SystemExit: after ``--help`` and ``--print_config``.
    """
    path, options = _split_arguments(arguments)
    flags = [option for option in options if option.startswith(INFORMATION_FLAGS)]
    given = _read_file(path) if path else {}
    given.update(_read_options([option for option in options if option not in flags]))
    preset, preset_faults = _preset(given.get("model.preset"))

    missing = "add it to the YAML file" + ("" if preset else " (a model's may come from model.preset)")
    reader = Reader(
        [*_leaves(Config), *_sections(Config)], when_missing=f": {missing}", when_unknown=" --help lists them all."
    )
    config = reader.read(Config, _nest(preset | given))
    faults = preset_faults + reader.faults
    if not given.keys() & {"train.steps", "train.epochs"}:
        faults.append(f"train.steps is missing: {missing}.")
    if preset_faults:  # the right one would give what seems to be missing
        faults = [fault for fault in faults if not (fault.startswith("model.") and f"is missing: {missing}." in fault)]
    if flags:
        _inform(program, preset, given, flags, [fault for fault in faults if not fault.endswith(f": {missing}.")])
    if path is None:
        faults = [fault for fault in faults if not fault.endswith(f"is missing: {missing}.")]
        faults += ["No configuration was given: name a YAML file as the first argument."]
    if not faults:
        assert config is not None, "what could not be read is told"
        faults = validate(config, world_size)
        if not faults:
            return config
    raise ConfigError(faults)


def _inform(
    program: str, preset: dict[str, Any], given: dict[str, Any], flags: list[str], faults: list[str]
) -> NoReturn:
    """Prints what the flags ask for. What is printed as a configuration may lack options, but has no wrong ones."""
    if faults and any(flag.startswith("--print_config") for flag in flags):
        raise ConfigError(faults)
    known = {key: value for key, value in given.items() if _is_known(key)}
    try:
        _parser(program, preset).parse_args(_nested_arguments(known) + flags)
    except OSError as error:
        raise ConfigError(f"{flags[0]} cannot be printed: {describe_os_error(error)}") from error
    sys.exit(0)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that ``load_config`` reads back."""
    plain = dataclasses.asdict(config)
    plain["optimizer"]["betas"] = list(config.optimizer.betas)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def model_from_dict(fields: dict[str, Any]) -> ModelConfig:
    """A ModelConfig from its ``dataclasses.asdict`` form."""
    scaling = fields.get("rope_scaling")
    return ModelConfig(**fields | {"rope_scaling": RopeScaling(**scaling) if scaling else None})


def _split_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return None, arguments


def _read_file(path: str) -> dict[str, Any]:
    tree = read_yaml(Path(path), "configuration file")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no sections: write 'model:', 'data:', 'train:' and so on.")
    return _flatten(tree, _sections(Config))


def _read_options(options: list[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    rest = list(options)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--"):
            raise ConfigError(f"'{name}' stands alone on the command line: options are --section.key value.")
        name, equals, value = name[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{name} has no value: write --{name} VALUE.")
            value = rest.pop(0)
        try:
            given[name] = parse_yaml(value)
        except MisleadingYAMLError as error:
            raise ConfigError(f"--{name} {value}: {error.problem}.") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"--{name} {value}: not a YAML value. Put quotes around it.") from error
    sections = _sections(Config)
    bare = [name for name, value in given.items() if name in sections and not isinstance(value, dict)]
    if bare:
        raise ConfigError([f"--{name} is a section: write --{name}.KEY VALUE." for name in bare])
    return _flatten(_nest(given), sections)


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _sections(cls: type) -> dict[str, type]:
    """Names of the fields of ``cls`` that are dataclasses themselves."""
    return {
        name: hint for name, hint in _hints(cls).items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)
    }


def _leaves(cls: type, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Every ``section.key`` of the schema with its field."""
    found: dict[str, dataclasses.Field[Any]] = {}
    sections = _sections(cls)
    for field in dataclasses.fields(cls):
        if field.name in sections:
            found.update(_leaves(sections[field.name], f"{prefix}{field.name}."))
        else:
            found[prefix + field.name] = field
    return found


def _flatten(tree: dict[str, Any], sections: dict[str, type], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key in sections and value is None:
            continue  # an empty section: all of it has defaults, or is missing
        found = (
            _flatten(value, _sections(sections[key]), f"{name}.")
            if key in sections and isinstance(value, dict)
            else {name: value}
        )
        twice = sorted(flat.keys() & found.keys())
        if twice:
            raise ConfigError([f"{option} is given twice: leave one out." for option in twice])
        flat.update(found)
    return flat


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, key = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{name} is given, and {part} itself as {node!r}: leave one of them out.")
        if key in node:
            raise ConfigError(f"{name} is given, and {name}.{next(iter(node[key]))} by itself: leave one of them out.")
        node[key] = value
    return tree


def _is_known(key: str) -> bool:
    leaves = _leaves(Config)
    return key in leaves or any(key.startswith(f"{leaf}.") for leaf in leaves)


def _preset(name: Any) -> tuple[dict[str, Any], list[str]]:
    if name is None:
        return {}, []
    if not isinstance(name, str) or name not in PRESETS:
        meant = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f" Did you mean {meant[0]}?" if meant else ""
        return {}, [f"model.preset is {name}: there is no such preset.{hint} There are: {', '.join(PRESETS)}."]
    return {f"model.{key}": value for key, value in PRESETS[name].items()}, []


def _parser(program: str, defaults: dict[str, Any]) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=program,
        usage="megatron-med train [--nproc-per-node N --] CONFIG.yaml [--section.key value ...]\n"
        "       megatron-med train CONFIG.yaml [...] --dry-run --world-size N --rank R   (one rank, no cluster)",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="The YAML file; may stand as first argument alone.")
    parser.add_class_arguments(Config)
    parser.set_defaults(defaults)
    return parser


def _nested_arguments(known: dict[str, Any]) -> list[str]:
    """The given values as one in-line configuration."""
    return ["--config", yaml.safe_dump(_nest(known))] if known else []


def peek_output_dir(arguments: list[str]) -> str | None:
    """``train.output_dir`` of a command line that was refused, where it can be read."""
    path, options = _split_arguments(arguments)
    try:
        given = _read_file(path) if path else {}
        given.update(_read_options([option for option in options if not option.startswith(INFORMATION_FLAGS)]))
    except ConfigError:
        return None
    folder = given.get("train.output_dir")
    try:
        return expand_path(folder) if isinstance(folder, str) else None
    except ValueError:
        return None
