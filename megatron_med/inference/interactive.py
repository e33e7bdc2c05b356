"""A conversation on the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from megatron_med.errors import DataError
from megatron_med.inference.answers import encode_prompt
from megatron_med.inference.engine import Engine
from megatron_med.inference.load import Loaded, request_fault
from megatron_med.inference.request import Request, row_seed
from megatron_med.parallel.collectives import broadcast_object

HELP = "/new begins a new conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer."


@dataclass
class Conversation:
    """Messages so far, and how many questions were asked in all."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    asked: int = 0


def converse(loaded: Loaded, engine: Engine, max_new_tokens: int, seed: int, add_bos: bool) -> None:
    """Reads a line, streams the answer, and so on until the input ends. Rank 0 has the terminal.

    A model with a chat template keeps the conversation; any other one goes on from each line alone.
    """
    world = loaded.model.context.world
    chats = loaded.chat is not None
    if world.is_first:
        what = "keeps the conversation" if chats else "has no chat template: each line is a text that it goes on from"
        print(f"The model {what}. {HELP}", flush=True)
    conversation = Conversation()
    while True:
        line = broadcast_object(_read_line() if world.is_first else None, world)
        if line is None or line == "/quit":
            return
        if line == "/new":
            conversation.messages.clear()
        elif line.strip():
            _answer(loaded, engine, conversation, line, Request([], max_new_tokens, seed), add_bos)


def _read_line() -> str | None:
    """The next line; None at the end of the input. Ctrl-C gives up what was typed."""
    while True:
        try:
            line = input("> ")
            line.encode("utf-8")  # stdin lets broken bytes through as half characters
            return line
        except EOFError:
            print(flush=True)
            return None
        except KeyboardInterrupt:
            print(f"\n{HELP}", flush=True)
        except UnicodeError:
            print("The line is not UTF-8 text: type it again.", flush=True)


def _answer(
    loaded: Loaded, engine: Engine, conversation: Conversation, line: str, like: Request, add_bos: bool
) -> None:
    """Streams the answer to one line, and remembers both where the model converses."""
    is_first = loaded.model.context.world.is_first
    messages = conversation.messages
    if loaded.chat is not None:
        messages.append({"role": "user", "content": line})
    try:
        ids = _prompt(loaded, messages, line, add_bos, like.max_new_tokens, is_first)
    except DataError as error:
        ids = None
        _tell(is_first, str(error))
    if ids is None:
        messages[-1:] = []
        return
    request = Request(ids, like.max_new_tokens, row_seed(like.seed, conversation.asked))
    conversation.asked += 1
    text = ""
    with _stoppable() as stopped:
        for answer in engine.stream([request]):
            if is_first:
                sys.stdout.write(answer.text[len(text) :])
                sys.stdout.flush()
            text = answer.text
            if stopped():
                break
    _tell(is_first, "")
    if loaded.chat is not None:
        messages.append({"role": "assistant", "content": text})


def _prompt(
    loaded: Loaded, messages: list[dict[str, Any]], line: str, add_bos: bool, new: int, is_first: bool
) -> list[int] | None:
    """Ids of the conversation, without its oldest parts where it has grown too long; None where the line alone is."""
    forgot = False
    while True:
        chats = loaded.chat is not None
        ids = loaded.chat_encoder().encode_prompt(messages) if chats else encode_prompt(line, loaded, add_bos)
        fault = request_fault(Request(ids, new), loaded.model.config)
        if fault is None:
            if forgot:
                _tell(is_first, "(The conversation is longer than the model can read: its beginning is left out.)")
            return ids
        if len(messages) < 3:
            _tell(is_first, f"Your text {fault}")
            return None
        del messages[:2]
        forgot = True


def _tell(is_first: bool, text: str) -> None:
    if is_first:
        print(text, flush=True)


@contextmanager
def _stoppable() -> Iterator[Any]:
    """Ctrl-C sets a flag meanwhile: no pass of the model is broken off in the middle."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
