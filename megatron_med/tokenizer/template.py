"""Chat templates: Jinja, as Hugging Face and its servers have them. The known ones are data files in ``templates/``.

A template renders a conversation to one text; ``{% generation %}`` marks what the model is to write. Rendering is
transformers' own (same environment, same functions), so that a server renders what was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_med.errors import ConfigError, DataError
from megatron_med.tokenizer.load import Tokenizer

FOLDER = Path(__file__).parent / "templates"
OWN = "tokenizer"
"""Name of the template that a tokenizer brings itself."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A template that belongs to one tokenizer: its begin and end tokens stand in it.

    Attributes:
        name: of the data file, the Jinja file, or ``tokenizer``.
        jinja: what servers take as ``chat_template``.
    """

    name: str
    jinja: str

    @property
    def marks_answers(self) -> bool:
        """Whether the template itself says what is trained."""
        return _GENERATION.search(self.jinja) is not None


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: with ``guard`` after the first character of every special token's name that some message holds.
        answers: spans of it that the template marks with ``{% generation %}``.
        guard: a character that nothing else in the text holds.
    """

    text: str
    answers: list[tuple[int, int]]
    guard: str


def template_names() -> list[str]:
    """Names of the templates that come as data files."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """A template by its name, of a Jinja file, or the tokenizer's own (``tokenizer``).

    Raises:
        ConfigError: there is none of that name.
        DataError: the tokenizer lacks a special token that the template needs.
    """
    if name == OWN:
        return ChatTemplate(OWN, _bound(_own_template(tokenizer), tokenizer, OWN))
    if name in template_names():
        content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        _need_tokens(name, content.get("tokens", []), tokenizer)
        return ChatTemplate(name, _bound(content["chat_template"], tokenizer, name))
    file = Path(name)
    if file.suffix == ".jinja" and file.is_file():
        return ChatTemplate(file.name, _bound(file.read_text(encoding="utf-8"), tokenizer, name))
    raise ConfigError(
        f"--template is '{name}': give {', '.join(template_names())}, 'tokenizer' for the one that the tokenizer "
        "brings, or a .jinja file."
    )


def render(
    template: ChatTemplate, messages: Sequence[Message], guarded: re.Pattern[str] | None = None, prompt: bool = False
) -> Rendered:
    """Renders a conversation.

    Args:
        template: bound to its tokenizer.
        messages: role, content, and further fields that the template may read.
        guarded: names that are made unrecognisable where a message holds them: text stays text.
        prompt: end with what the answer is asked for with.

    Raises:
        DataError: the template refuses the conversation, or cannot be read.
    """
    free = _free_characters(messages)
    begin, end, guard = next(free), next(free), next(free)
    if guarded is not None:
        messages = [_map_text(message, lambda text: _guard(text, guarded, guard)) for message in messages]
    try:
        compiled = _compiled(template.jinja)
        text = compiled.render(messages=messages, add_generation_prompt=prompt, marks=None, **{_MARKS: (begin, end)})
    except jinja2.TemplateError as error:
        raise DataError(f"the template {template.name} refuses the conversation: {error}") from error
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise DataError(f"the template {template.name} cannot render the conversation: {error}") from error
    return _without_marks(text, begin, end, guard)


def _bound(source: str, tokenizer: Tokenizer, name: str) -> str:
    """The template with the tokenizer's begin and end tokens in it, so that it needs nothing else."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eod_id}
    names = tokenizer.special_tokens()
    head = ""
    for variable, number in ids.items():
        if not re.search(rf"\b{variable}\b", source):
            continue
        if number is None and variable == "eos_token":
            raise DataError(
                f"the template {name} ends answers with the end token, and {tokenizer.files[0]} has none: add one, or "
                "take a template with a token of its own, such as chatml."
            )
        head += f"{{%- set {variable} = {json.dumps(names.get(number, '') if number is not None else '')} -%}}"
    return head + source


def _need_tokens(name: str, tokens: Sequence[str], tokenizer: Tokenizer) -> None:
    missing = sorted(set(tokens).difference(tokenizer.special_tokens().values()))
    if missing:
        remedy = (
            "extend it: megatron-med extend-tokenizer --tokens chatml" if name == "chatml" else "give one that has it"
        )
        raise DataError(
            f"the template {name} needs the special token {', '.join(missing)}, which {tokenizer.files[0]} does not "
            f"have: {remedy}, or take another template."
        )


def brings_template(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer comes with a chat template of its own."""
    return _find_own(tokenizer) is not None


def _own_template(tokenizer: Tokenizer) -> str:
    own = _find_own(tokenizer)
    if own is None:
        raise DataError(
            f"{tokenizer.files[0].parent} has no chat_template (in chat_template.jinja or tokenizer_config.json): name "
            f"a template of ours ({', '.join(template_names())}) or a .jinja file."
        )
    return own


def _find_own(tokenizer: Tokenizer) -> str | None:
    folder = tokenizer.files[0].parent
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    own = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    if isinstance(own, list):  # several by name
        own = next((entry.get("template") for entry in own if entry.get("name") == "default"), None)
    return own if isinstance(own, str) else None


def _free_characters(messages: Sequence[Message]) -> Any:
    """Characters of a private area that no message holds."""
    used = set(json.dumps(list(map(dict, messages)), ensure_ascii=False, default=str))
    return (character for character in map(chr, range(0xF0000, 0xFFFFD)) if character not in used)


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    """A message with every text in it changed; its role stays."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: item if key == "role" else _map_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_text(item, change) for item in value]
    return value


def _guard(text: str, names: re.Pattern[str], guard: str) -> str:
    return names.sub(lambda match: match[0][0] + guard + match[0][1:], text)


def _without_marks(text: str, begin: str, end: str, guard: str) -> Rendered:
    """Takes the marks of the generated spans out, and says where they stood."""
    parts = re.split(f"([{begin}{end}])", text)
    clean, answers, length = [], [], 0
    for part in parts:
        if part == begin:
            answers.append((length, length))
        elif part == end:
            answers[-1] = (answers[-1][0], length)
        else:
            clean.append(part)
            length += len(part)
    return Rendered("".join(clean), answers, guard)


_MARKS = "_megatron_med_marks"
_COMPILED: dict[str, jinja2.Template] = {}  # compiling takes milliseconds, and a data set has one template


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``: puts a mark in front of what stands in it, and one behind."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as an instance's)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = jinja2.nodes.Name(_MARKS, "load")
        return jinja2.nodes.CallBlock(self.call_method("_marked", [marks]), [], [], body).set_lineno(line)

    def _marked(self, marks: tuple[str, str], caller: Callable[[], str]) -> str:
        return marks[0] + caller() + marks[1]


def _compiled(source: str) -> jinja2.Template:
    """The template in transformers' environment (its ``chat_template_utils``)."""
    if source not in _COMPILED:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        _COMPILED[source] = environment.from_string(source)
    return _COMPILED[source]


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
