"""Records of instruction data as conversations: messages of system, user and assistant.

A user's message also holds the parts it was made of (``instruction, input``; ``question, options, context``), which
templates of the published systems read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_med.data.jsonl import BadLine, Line, content_of
from megatron_med.errors import ConfigError, DataError

Answers = Literal["letter", "option", "explained"]

ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("user", "human", "prompter", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "answer"), "assistant"),
}
"""What the common forms call the three roles."""

_LETTERS = "ABCDEFGHIJ"
_OPTIONS = ("opa", "opb", "opc", "opd")
_PAIRS = (("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("input", "output"))

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages, and how many at the beginning another conversation trains."""

    messages: list[Message]
    shared: int = 0


@dataclass(frozen=True)
class Form:
    """How records are read.

    Attributes:
        name: of the form; ``auto`` takes it from each record.
        answers: of multiple-choice questions: the letter, the option's text, or the explanation and the letter.
        prompt: instruction in front of a question and text behind it, as published; empty ones add nothing.
        columns: of a table: fields that hold question, answer, and perhaps context and system message.
        first_option: number of the first option in MedMCQA's ``cop``: 0 or 1.
    """

    name: str = "auto"
    answers: Answers = "letter"
    prompt: tuple[str, str] = ("", "")
    columns: Mapping[str, str] = field(default_factory=dict)
    first_option: int | None = None


def conversations_of(line: Line, form: Form) -> list[Conversation]:
    """The conversations of a record; a tree holds several.

    Raises:
        BadLine: a field is missing or of another kind, a role is unknown, or there is no answer.
    """
    record = record_of(line)
    name = form_of(record, form)
    found = list(FORMS[name](record, form))
    if not found:
        raise BadLine("no answer in it")
    for conversation in found:
        check_messages(conversation.messages)
    return found


def record_of(line: Line) -> dict[str, Any]:
    """A record as an object.

    Raises:
        BadLine: it is none.
    """
    record = content_of(line)
    if not isinstance(record, dict):
        raise BadLine(f"{type(record).__name__}, not an object with fields")
    return record


def form_of(record: Mapping[str, Any], form: Form) -> str:
    """Name of the form of a record.

    Raises:
        BadLine: its fields are of none.
    """
    if form.columns:
        return "table"
    if form.name != "auto":
        return form.name
    for name, needed in _SIGNS.items():
        if needed(record):
            return name
    raise BadLine(f"fields {', '.join(sorted(record)[:8])}: of no known form. Name it with --format, or its --columns")


def check_messages(messages: Sequence[Message]) -> None:
    """Raises BadLine where a conversation cannot be trained."""
    last = "nothing"
    for number, message in enumerate(messages, start=1):
        role, content = message["role"], message["content"]
        if role == "system" and number > 1:
            raise BadLine(f"message {number} is a system message: it can only be the first")
        if role == "assistant" and last == "assistant":
            raise BadLine(f"message {number} is the second answer in a row")
        if role == "assistant" and last != "user":
            raise BadLine(f"message {number} is an answer to nothing")
        if not content.strip() and (role != "user" or not message.get("input")):
            raise BadLine(f"message {number} ({role}) is empty")
        last = role
    if last != "assistant":
        raise BadLine("it ends without an answer")


def find_first_option(records: Iterator[Mapping[str, Any]]) -> int:
    """Whether MedMCQA counts the options from 0 or from 1, from all its records.

    Raises:
        DataError: they say both, or neither.
    """
    seen = {int(value) for record in records if isinstance(value := record.get("cop"), int | str) and _is_whole(value)}
    zero, four = 0 in seen, 4 in seen
    if zero == four:
        said = "0 and 4 both stand there" if zero else "neither 0 nor 4 stands there"
        raise DataError(
            f"--input: whether MedMCQA's cop counts the options from 0 (the hub) or from 1 (the original files) cannot "
            f"be told: {said}. Give whole files of one kind, or --first-option 0 or 1."
        )
    return 0 if zero else 1


def _is_whole(value: int | str) -> bool:
    return isinstance(value, int) or value.strip().lstrip("-").isdigit()


def _text(record: Mapping[str, Any], key: str, optional: bool = False) -> str:
    value = record.get(key)
    if value is None and optional:
        return ""
    if key not in record:
        raise BadLine(f"no field '{key}'")
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise BadLine(f"'{key}' is {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLine(f"'{key}' holds half of a surrogate pair, which is no character") from error
    return value


def _role(name: Any) -> str:
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise BadLine(f"unknown role {name!r}: system, user and assistant are known, and what ShareGPT calls them")
    return ROLES[name.lower()]


def _from_messages(record: Mapping[str, Any], form: Form) -> Iterator[Conversation]:
    yield Conversation(_messages(record, "messages", "role", "content"))


def _from_sharegpt(record: Mapping[str, Any], form: Form) -> Iterator[Conversation]:
    key = "conversations" if "conversations" in record else "conversation"
    system = record.get("system")
    first = [{"role": "system", "content": _text(record, "system")}] if system else []
    yield Conversation([*first, *_messages(record, key, "from", "value")])


def _messages(record: Mapping[str, Any], key: str, role: str, content: str) -> list[Message]:
    messages = record.get(key)
    if not isinstance(messages, list) or not messages:
        raise BadLine(f"'{key}' is no list of messages")
    found = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadLine(f"'{key}' holds {type(message).__name__}, not messages")
        found.append({"role": _role(message.get(role)), "content": _text(message, content)})
    return found


def _from_alpaca(record: Mapping[str, Any], form: Form) -> Iterator[Conversation]:
    instruction, given = _text(record, "instruction"), _text(record, "input", optional=True)
    content = f"{instruction}\n\n{given}" if given else instruction
    message = {"role": "user", "content": content, "instruction": instruction, "input": given}
    yield _asked(message, _text(record, "output"))


def _from_pair(record: Mapping[str, Any], form: Form) -> Iterator[Conversation]:
    question, answer = next((pair for pair in _PAIRS if pair[0] in record and pair[1] in record), _PAIRS[0])
    yield _asked({"role": "user", "content": _text(record, question)}, _text(record, answer))


def _from_table(record: Mapping[str, Any], form: Form) -> Iterator[Conversation]:
    columns = form.columns
    question = _text(record, columns["question"])
    context = _text(record, columns["context"]) if "context" in columns else ""
    message = {"role": "user", "content": f"{context}\n{question}" if context else question}
    if context:
        message |= {"question": question, "context": context, "instruction": question, "input": context}
    conversation = _asked(message, _text(record, columns["answer"]))
    if "system" in columns:
        conversation.messages.insert(0, {"role": "system", "content": _text(record, columns["system"])})
    yield conversation


def _from_medqa(record: Mapping[str, Any], form: Form) -> Iterator[Conversation]:
    options = record.get("options")
    if isinstance(options, list):  # as bigbio has it
        options = {str(option.get("key")): option.get("value") for option in options if isinstance(option, dict)}
    if not isinstance(options, dict) or not options or not all(isinstance(text, str) for text in options.values()):
        raise BadLine("'options' holds no texts by letter")
    letter = record.get("answer_idx")
    if letter not in options:
        letter = next((name for name, text in options.items() if text == record.get("answer")), None)
    if letter is None:
        raise BadLine("neither 'answer_idx' nor 'answer' names one of the options")
    yield _choice(_text(record, "question"), options, letter, _text(record, "explanation", optional=True), form)


def _from_medmcqa(record: Mapping[str, Any], form: Form) -> Iterator[Conversation]:
    options = {letter: _text(record, key) for letter, key in zip(_LETTERS, _OPTIONS, strict=False)}
    right = record.get("cop")
    if not isinstance(right, int | str) or not _is_whole(right):
        raise BadLine(f"'cop' is {right!r}, not the number of an option")
    place = int(right) - (form.first_option or 0)
    if not 0 <= place < len(options):
        raise BadLine(f"'cop' is {right}: no option has that number, counted from {form.first_option or 0}")
    yield _choice(_text(record, "question"), options, _LETTERS[place], _text(record, "exp", optional=True), form)


def _choice(question: str, options: Mapping[str, str], letter: str, explanation: str, form: Form) -> Conversation:
    """Meditron's wording (epfLLM/meditron, evaluation/benchmarks.py, format_mcq and add_instruction)."""
    asked = question if question.endswith(("?", ".")) else f"{question}?"
    listed = "\n".join(f"{name}. {text}" for name, text in options.items())
    message = {
        "role": "user",
        "content": _framed(f"Question: {asked}\n\nOptions:\n{listed}", form),
        "question": question,
        "options": dict(options),
    }
    return _asked(message, _chosen(letter, options[letter], explanation, form))


def _chosen(short: str, text: str, explanation: str, form: Form) -> str:
    if form.answers == "letter":
        return short
    if form.answers == "option":
        return text
    if not explanation.strip():
        raise BadLine("no explanation to answer with")
    return f"{explanation}.\nThe answer is: {short} ###"


def _framed(question: str, form: Form) -> str:
    before, behind = form.prompt
    return "\n".join(part for part in (before, question, behind) if part)


def _from_pubmedqa(record: Mapping[str, Any], form: Form) -> Iterator[Conversation]:
    """As the original files have it, or flat as the hub does."""
    fields = {key.lower(): value for key, value in record.items()}
    contexts: Any = fields.get("contexts")
    if contexts is None and isinstance(fields.get("context"), dict):
        contexts = fields["context"].get("contexts")
    if not isinstance(contexts, list) or not all(isinstance(text, str) for text in contexts):
        raise BadLine("'CONTEXTS' is no list of texts")
    context = "\n".join(contexts)
    question, decision = _text(fields, "question"), _text(fields, "final_decision")
    message = {
        "role": "user",
        "content": _framed(f"{context}\n{question}", form),
        "question": question,
        "context": context,
        "options": {"A": "yes", "B": "no", "C": "maybe"},
    }
    long = _text(fields, "long_answer", optional=True)
    yield _asked(message, _chosen(decision, decision, long, form))


def _from_oasst(record: Mapping[str, Any], form: Form) -> Iterator[Conversation]:
    """Every path of a tree, cut after its last answer. What several paths share is trained in the first of them."""
    paths = [path for path in _paths(record.get("prompt", record)) if path]
    kept = [path for path in paths if not any(_begins(other, path) for other in paths if other is not path)]
    done: set[tuple[int, ...]] = set()
    for path in _without_twins(kept):
        numbers = tuple(id(node) for node in path)
        shared = next((count for count in range(len(numbers), 0, -1) if numbers[:count] in done), 0)
        done.update(numbers[:count] for count in range(1, len(numbers) + 1))
        yield Conversation([{"role": _role(node.get("role")), "content": _text(node, "text")} for node in path], shared)


def _paths(node: Any, before: tuple[Mapping[str, Any], ...] = ()) -> Iterator[tuple[Mapping[str, Any], ...]]:
    if not isinstance(node, dict) or "text" not in node:
        raise BadLine("'prompt' is no tree of messages with 'text' and 'role'")
    path = (*before, node)
    replies = node.get("replies") or []
    if not replies:
        while path and _role(path[-1].get("role")) != "assistant":
            path = path[:-1]
        yield path
    for reply in replies:
        yield from _paths(reply, path)


def _begins(longer: Sequence[Any], path: Sequence[Any]) -> bool:
    """Whether a path is the beginning of a longer one; nodes are compared by identity."""
    return len(longer) > len(path) and all(a is b for a, b in zip(longer, path, strict=False))


def _without_twins(paths: Sequence[tuple[Mapping[str, Any], ...]]) -> list[tuple[Mapping[str, Any], ...]]:
    return list({tuple(id(node) for node in path): path for path in paths}.values())


def _asked(message: Message, answer: str) -> Conversation:
    return Conversation([message, {"role": "assistant", "content": answer}])


FORMS: dict[str, Callable[[Mapping[str, Any], Form], Iterator[Conversation]]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "medmcqa": _from_medmcqa,
    "medqa": _from_medqa,
    "pubmedqa": _from_pubmedqa,
    "oasst": _from_oasst,
    "qa": _from_pair,
    "table": _from_table,
}
"""From a record to its conversations, by the form's name."""

_SIGNS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "messages": lambda record: "messages" in record,
    "sharegpt": lambda record: "conversations" in record or "conversation" in record,
    "alpaca": lambda record: "instruction" in record and "output" in record,
    "medmcqa": lambda record: "cop" in record and "opa" in record,
    "medqa": lambda record: "options" in record and "question" in record,
    "pubmedqa": lambda record: "final_decision" in record or "FINAL_DECISION" in record,
    "oasst": lambda record: isinstance(record.get("prompt"), dict) and "text" in record["prompt"],
    "qa": lambda record: any(first in record and second in record for first, second in _PAIRS),
}


def form_names() -> list[str]:
    """What ``--format`` takes."""
    return ["auto", *(name for name in FORMS if name != "table")]


def parse_columns(pairs: Sequence[str]) -> dict[str, str]:
    """Columns from ``question=NAME answer=NAME``.

    Raises:
        ConfigError: not of that form, or question or answer is missing.
    """
    known = ("question", "answer", "context", "system")
    columns = dict(pair.partition("=")[::2] for pair in pairs)
    if any(name not in known or not value for name, value in columns.items()) or (
        columns and not {"question", "answer"} <= columns.keys()
    ):
        raise ConfigError(
            f"--columns is {' '.join(pairs)}: question=NAME and answer=NAME are needed, context=NAME and system=NAME "
            "may be there."
        )
    return columns
