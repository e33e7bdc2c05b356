"""Reads a configuration: YAML file, then ``--section.key value``, then every rule, then one error with all faults."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import typing
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from megatron_med.config.presets import PRESETS
from megatron_med.config.schema import Config, ModelConfig, RopeScaling
from megatron_med.config.validate import validate
from megatron_med.errors import ConfigError

_PLACEHOLDERS = {
    "model.family": "llama",
    "model.num_layers": 1,
    "model.hidden_size": 1,
    "model.num_attention_heads": 1,
    "model.vocab_size": 1,
    "model.max_position_embeddings": 1,
    "data.sequence_length": 1,
    "train.steps": 1,
    "train.global_batch_size": 1,
    "train.output_dir": "RUN",
}
"""Stand-ins for required fields while the others are checked one by one."""

_EXAMPLES = dict.fromkeys(("data.train", "data.valid"), "Expected a list such as [{path: PREFIX, weight: 1.0}].")
"""What is expected where the parser's own words do not help."""

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
    given = _read_yaml(path) if path else {}
    given.update(_read_options([option for option in options if option not in flags]))

    schema = _leaves(Config)
    faults = _unknown_keys(given, schema)
    known = {key: value for key, value in given.items() if _is_known(key, schema)}
    preset, preset_faults = _preset(known.get("model.preset"))
    faults += preset_faults

    if flags:
        parser = _parser(program, preset)
        parser.parse_args(_nested_arguments(known) + flags)
        sys.exit(0)

    told = {fault.split(":")[0] for fault in faults}
    faults += _wrong_types({key: value for key, value in known.items() if key not in told})
    if path is None:
        faults += ["No configuration was given: name a YAML file as the first argument."]
    else:
        faults += _missing(known, preset, schema)
    if not faults:
        config = _build(program, preset, known)
        faults = validate(config, world_size)
        if not faults:
            return config
    raise ConfigError(faults)


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


def _read_yaml(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise ConfigError(f"There is no configuration file {path}. Give the path of a YAML file.")
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}. Mend that line.") from error
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
            given[name] = yaml.safe_load(value)
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
        if key in sections and isinstance(value, dict):
            flat.update(_flatten(value, _sections(sections[key]), f"{name}."))
        else:
            flat[name] = value
    return flat


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, key = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[key] = value
    return tree


def _is_known(key: str, schema: dict[str, Any]) -> bool:
    return key in schema or any(key.startswith(f"{leaf}.") for leaf in schema)


def _unknown_keys(given: dict[str, Any], schema: dict[str, dataclasses.Field[Any]]) -> list[str]:
    names = [*schema, *_sections(Config)]
    faults = []
    for key, value in given.items():
        if not _is_known(key, schema):
            faults.append(f"{key} is not an option{_did_you_mean(key, names)}")
        elif isinstance(value, (dict, list)):
            faults += _unknown_item_keys(key, value)
    return faults


def _unknown_item_keys(key: str, value: Any) -> list[str]:
    """Unknown keys inside values that hold dataclasses themselves: a list of corpora, a rope scaling."""
    section, _, name = key.partition(".")
    hint = _hints(_sections(Config)[section])[name] if name else None
    inner = next((cls for cls in typing.get_args(hint) if dataclasses.is_dataclass(cls)), None)
    if inner is None:
        return []
    names = [field.name for field in dataclasses.fields(inner)]
    items = value if isinstance(value, list) else [value]
    unknown = [word for item in items if isinstance(item, dict) for word in item if word not in names]
    return [f"{key}: {word} is not an option{_did_you_mean(word, names)}" for word in unknown]


def _did_you_mean(key: str, names: list[str]) -> str:
    last = key.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.75)
    close = close or [name for name in names if name.rsplit(".", 1)[-1] == last]
    if close:
        return f": did you mean {close[0]}?"
    return ". --help lists them all."


def _preset(name: Any) -> tuple[dict[str, Any], list[str]]:
    if name is None:
        return {}, []
    if name not in PRESETS:
        meant = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f" Did you mean {meant[0]}?" if meant else ""
        return {}, [f"model.preset is {name}: there is no such preset.{hint} There are: {', '.join(PRESETS)}."]
    return {f"model.{key}": value for key, value in PRESETS[name].items()}, []


def _parser(program: str, defaults: dict[str, Any]) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=program,
        usage="torchrun --nproc-per-node N -m %(prog)s CONFIG.yaml [--section.key value ...]\n"
        "       python -m %(prog)s CONFIG.yaml [...] --dry-run --world-size N --rank R   (one rank, no cluster)",
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


def _wrong_types(known: dict[str, Any]) -> list[str]:
    parser = _parser("check", _PLACEHOLDERS)
    faults = []
    for key, value in known.items():
        try:
            parser.parse_object(_nest({key: value}))
        except (ArgumentError, TypeError, ValueError) as error:
            reason = _EXAMPLES.get(key) or _reason(str(error))
            faults.append(f"{key} is {value!r}: {reason}")
    return faults


def _reason(message: str) -> str:
    """The sentences of a parser's message that tell what was expected."""
    lines = [line.strip(" -") for line in message.splitlines()[1:]]
    wanted = [line.split(" Got value")[0].rstrip(".") for line in lines if line.startswith(("Expected", "Key"))]
    text = "; ".join(dict.fromkeys(wanted)) or " ".join(lines or [message])
    text = re.sub(r"typing\.Literal\[(.*)\]", r"value out of \1", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    return f"{text}. --help tells more."


def _missing(known: dict[str, Any], preset: dict[str, Any], schema: dict[str, dataclasses.Field[Any]]) -> list[str]:
    missing = [
        key
        for key, field in schema.items()
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and key not in known
        and key not in preset
    ]
    remedy = " (or model.preset)" if any(key.startswith("model.") for key in missing) else ""
    return [f"{key} is missing: add it to the YAML file{remedy}." for key in missing]


def _build(program: str, preset: dict[str, Any], known: dict[str, Any]) -> Config:
    parser = _parser(program, preset)
    try:
        parsed = parser.parse_object(_nest(known))
    except ArgumentError as error:
        raise ConfigError(_reason(str(error))) from error
    sections = vars(parser.instantiate(parsed))
    return Config(**{field.name: sections[field.name] for field in dataclasses.fields(Config)})


def peek_output_dir(arguments: list[str]) -> str | None:
    """``train.output_dir`` of a command line that was refused, where it can be read."""
    path, options = _split_arguments(arguments)
    try:
        given = _read_yaml(path) if path else {}
        given.update(_read_options([option for option in options if not option.startswith(INFORMATION_FLAGS)]))
    except ConfigError:
        return None
    folder = given.get("train.output_dir")
    return folder if isinstance(folder, str) else None
