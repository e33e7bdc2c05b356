"""A file of prompts answered into a file of answers, which a killed run goes on with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from megatron_med.data.jsonl import BadLine, content_of, read_lines
from megatron_med.errors import ConfigError, DataError, TargetExistsError
from megatron_med.files import naming, sync, whole_lines, write_json
from megatron_med.inference.load import Loaded, request_fault
from megatron_med.inference.request import Answer, Request, row_seed

SETTINGS = ".settings.json"
"""Ending of the file beside the answers that says how they were made."""


@dataclass(frozen=True)
class Prompt:
    """A record of the file of prompts.

    Attributes:
        place: file and line.
        record: as it is written there.
        ids: what the model reads.
    """

    place: str
    record: dict[str, Any]
    ids: list[int]


def read_prompts(path: Path, loaded: Loaded, add_bos: bool, max_new_tokens: int) -> list[Prompt]:
    """Reads ``{"prompt": text}``, ``{"prompt_ids": [ids]}`` or ``{"messages": [...]}``, one a line.

    Raises:
        DataError: a line is none of them, or cannot be answered; file and line are named.
    """
    prompts = []
    for line in read_lines([path]):
        try:
            record = content_of(line)
            ids = _ids_of(record, loaded, add_bos)
        except (BadLine, DataError, ConfigError) as error:
            raise DataError(f"{line.place}: {error}. Correct that line.") from error
        fault = request_fault(Request(ids, max_new_tokens), loaded.model.config)
        if fault:
            raise DataError(f"{line.place}: the prompt {fault}")
        prompts.append(Prompt(line.place, record, ids))
    if not prompts:
        raise DataError(f'{path} holds no prompt: write one a line, such as {{"prompt": "..."}}.')
    return prompts


def _ids_of(record: Any, loaded: Loaded, add_bos: bool) -> list[int]:
    if not isinstance(record, dict):
        raise BadLine('the line is no object such as {"prompt": "..."}')
    given = [name for name in ("prompt", "prompt_ids", "messages") if record.get(name) is not None]
    if len(given) > 1:
        raise BadLine(f"{given[0]} and {given[1]} are both there: one says what is asked")
    if record.get("messages") == []:
        raise BadLine("messages is empty: there is nothing to answer")
    _refuse_half_characters(json.dumps(record, ensure_ascii=False))
    if isinstance(record.get("prompt"), str):
        return encode_prompt(record["prompt"], loaded, add_bos)
    ids = record.get("prompt_ids")
    if isinstance(ids, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        return ids
    messages = record.get("messages")
    if isinstance(messages, list) and all(map(_is_message, messages)):
        return loaded.chat_encoder().encode_prompt(messages)
    raise BadLine("none of the fields prompt (text), prompt_ids (numbers), messages (role and content) is there")


def _refuse_half_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadLine("a text holds half of a character (a lone surrogate)") from None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def encode_prompt(text: str, loaded: Loaded, add_bos: bool) -> list[int]:
    """Ids of a plain prompt.

    Raises:
        ConfigError: there is no tokenizer.
    """
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise ConfigError(f"{loaded.source} holds no tokenizer: give --prompt-ids instead of --prompt.")
    begin = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
    return [*begin, *tokenizer.encode(text)]


def requests_of(prompts: Sequence[Prompt], first: int, max_new_tokens: int, seed: int) -> list[Request]:
    """Requests for prompts whose first one has the number ``first`` in its file: its seed follows from that."""
    return [Request(prompt.ids, max_new_tokens, row_seed(seed, number)) for number, prompt in enumerate(prompts, first)]


def answered(prompt: Prompt, answer: Answer, with_text: bool) -> dict[str, Any]:
    """The record with its answer."""
    output: dict[str, Any] = {"output": answer.text} if with_text else {}
    score = {} if answer.score is None else {"score": answer.score}
    return prompt.record | output | {"output_ids": answer.tokens, "end": answer.end} | score


class AnswerFile:
    """Answers in the order of their prompts, each written as soon as all before it are.

    Args:
        path: of the answers.
        prompts: that they belong to.
        settings: that decide the answers; those of another run are refused.
        overwrite: begin anew.

    Raises:
        TargetExistsError: the file holds answers of other settings or other prompts, or another run writes it.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt], settings: dict[str, Any], overwrite: bool) -> None:
        self.path = path
        self._prompts = prompts
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_name(path.name + ".lock"), timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise TargetExistsError(f"{path} is being written by another process: wait for it to end.") from error
        beside = path.with_name(path.name + SETTINGS)
        if overwrite and path.exists() and _settings(beside) is None:
            raise TargetExistsError(
                f"{path} exists and is no file of answers: --overwrite does not replace it. Name another file."
            )
        if overwrite:
            path.unlink(missing_ok=True)
            beside.unlink(missing_ok=True)
        self.done = self._check(beside, settings) if path.exists() else 0
        write_json(beside, settings)
        self._file = path.open("a", encoding="utf-8")
        self._early: dict[int, dict[str, Any]] = {}

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Takes the answer to prompt ``number``."""
        self._early[number] = record
        with naming(self.path):
            while self.done in self._early:
                self._file.write(json.dumps(self._early.pop(self.done), ensure_ascii=False) + "\n")
                self.done += 1
            self._file.flush()

    def close(self) -> None:
        """Waits until the disk has everything."""
        with naming(self.path):
            sync(self._file.buffer)  # type: ignore[arg-type]
            self._file.close()
        self._lock.release()
        os.unlink(self._lock.lock_file)

    def _check(self, beside: Path, settings: dict[str, Any]) -> int:
        """Answers that stand already; a last line that a kill has cut is taken away."""
        earlier = _settings(beside)
        if earlier is None:
            raise TargetExistsError(f"{self.path} exists and is no file of answers: name another file.")
        different = [name for name in settings if earlier.get(name) != settings[name]]
        if different:
            name = different[0]
            raise TargetExistsError(
                f"{self.path} holds answers with {name} {earlier.get(name)!r}, not {settings[name]!r}: name another "
                "file, or pass --overwrite."
            )
        lines = whole_lines(self.path)
        for number, line in enumerate(lines):
            if number >= len(self._prompts) or not _belongs(line, self._prompts[number].record):
                raise TargetExistsError(
                    f"line {number + 1} of {self.path} answers another prompt than {self._other(number)}: name another "
                    "file, or pass --overwrite."
                )
        return len(lines)

    def _other(self, number: int) -> str:
        return self._prompts[number].place if number < len(self._prompts) else "any that is asked"


def _settings(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _belongs(line: str, record: dict[str, Any]) -> bool:
    try:
        answer = json.loads(line)
    except ValueError:
        return False
    added = ("output", "output_ids", "end", "score")
    asked = {name: value for name, value in record.items() if name not in added}
    stands = {name: answer.get(name) for name in asked}
    return json.dumps(stands, sort_keys=True) == json.dumps(asked, sort_keys=True)  # NaN is equal to itself so


def rounds(count: int, first: int, size: int) -> Iterator[range]:
    """The numbers from ``first`` on, ``size`` at a time."""
    return (range(start, min(start + size, count)) for start in range(first, count, size))
