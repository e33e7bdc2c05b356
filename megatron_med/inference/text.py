"""Text of tokens as they come."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_med.tokenizer import Tokenizer

_BEFORE = 6
"""Tokens of the prompt that are decoded together with the first new ones: enough to know whether a space stands
between them."""
_UNFINISHED = "\ufffd"


class TextStream:
    """Decodes one answer token by token. Bytes of a character that is not whole yet are held back.

    Args:
        tokenizer: of the model.
        prompt: ids that the answer follows.
        stop: texts that end the answer; they do not belong to it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_BEFORE:])
        self._begin = 0
        self._read = len(self._ids)
        self._stop = stop
        self.text = ""
        self.is_stopped = False

    def push(self, token: int) -> None:
        """Adds a token to ``text``."""
        self._ids.append(token)
        whole = self._tokenizer.decode(self._ids[self._begin :])
        if whole.endswith(_UNFINISHED):
            return
        self._add(whole)

    def close(self) -> str:
        """Adds what was held back. Returns the whole text."""
        if not self.is_stopped and self._read < len(self._ids):
            self._add(self._tokenizer.decode(self._ids[self._begin :]))
        return self.text

    def _add(self, whole: str) -> None:
        known = len(self._tokenizer.decode(self._ids[self._begin : self._read]))
        before = len(self.text)
        self.text += whole[known:]
        self._begin, self._read = self._read, len(self._ids)
        longest = max((len(text) for text in self._stop), default=1)
        found = [self.text.find(text, max(0, before - longest + 1)) for text in self._stop]
        ends = [place for place in found if place >= 0]
        if ends:
            self.is_stopped = True
            self.text = self.text[: min(ends)]

    def settled(self) -> str:
        """The part of ``text`` that no stop string can take back."""
        if self.is_stopped:
            return self.text
        longest = max((len(text) for text in self._stop), default=1)
        held = next(
            (size for size in range(min(longest - 1, len(self.text)), 0, -1) if self._could_begin(self.text[-size:])), 0
        )
        return self.text[: len(self.text) - held]

    def _could_begin(self, ending: str) -> bool:
        return any(text.startswith(ending) for text in self._stop)
