"""Conversations to ids, with the tokens that are trained.

A conversation is rendered to one text and encoded as such, cut at the special tokens only: ``### Response:`` and an
answer give other ids together than apart. What is trained follows from the characters a token stands for.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_med.errors import DataError
from megatron_med.tokenizer.load import Tokenizer
from megatron_med.tokenizer.template import ChatTemplate, Message, Rendered, render

CONTEXT, ANSWER, SHARED = 0, 1, 2
"""What a token is: read only, written by the model, or part of a beginning that another conversation trains."""

_PROBE = ({"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."})

Placed = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Conversation:
    """A conversation that training can read.

    Attributes:
        ids: of all tokens.
        roles: CONTEXT, ANSWER or SHARED for each.
    """

    ids: list[int]
    roles: npt.NDArray[np.uint8]

    @property
    def trained(self) -> int:
        """Tokens that count where only answers are trained."""
        return int((self.roles == ANSWER).sum())


class ChatEncoder:
    """Encodes conversations with one template.

    Attributes:
        turn_end_id: the special token that every answer ends with.

    Raises:
        DataError: the template ends answers with plain text, so that a model would never stop.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        names = {name: number for number, name in tokenizer.special_tokens().items() if len(name) > 1}
        self._ids = names
        longest_first = sorted(names, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first))) if names else None
        self._borders = _with_margins(longest_first, names, tokenizer.special_margins())
        self._specials = frozenset(names.values())
        self.turn_end_id = self._find_turn_end()

    def encode(self, messages: Sequence[Message], shared: int = 0) -> Conversation:
        """Ids of a conversation, and which of them are trained.

        Args:
            messages: role and content of each; the last one is an answer.
            shared: messages at the beginning that another conversation trains.

        Raises:
            DataError: the template does not fit, or nothing or everything would be trained.
        """
        rendered = render(self._template, messages, self._names)
        placed = self.place(rendered)
        ids = [token for token, _, _ in placed]
        if self._template.marks_answers:
            roles = _roles(placed, rendered.answers)
        else:
            roles = self._roles_by_beginnings(messages, ids)
        self._check(ids, roles)
        if shared:
            border = self._length_of_beginning(messages[:shared], rendered)
            roles[np.array([end <= border for _, _, end in placed])] = SHARED
        return Conversation(ids, roles)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the model is to write."""
        return [token for token, _, _ in self.place(render(self._template, messages, self._names, prompt=True))]

    def place(self, rendered: Rendered) -> Placed:
        """Every token with the characters it stands for, guards counted in."""
        text, found, begin = rendered.text, [], 0
        matches = self._borders.finditer(text) if self._borders else ()
        for match in matches:
            if match.start() > begin:
                found += self._place_part(text, begin, match.start(), rendered.guard)
            found.append((self._ids[match["name"]], match.start(), match.end()))
            begin = match.end()
        if begin < len(text):
            found += self._place_part(text, begin, len(text), rendered.guard)
        return found

    def _place_part(self, text: str, begin: int, end: int, guard: str) -> Placed:
        part = text[begin:end]
        guards = [place for place, character in enumerate(part) if character == guard]
        placed = self._tokenizer.encode_part(part.replace(guard, "") if guards else part, is_first=begin == 0)
        if not guards:
            return [(token, begin + start, begin + stop) for token, start, stop in placed]
        taken = [place - number for number, place in enumerate(guards)]  # where they stood, in the text without them
        shift = [bisect_left(taken, place + 1) for place in range(len(part) + 1)]
        return [(token, begin + start + shift[start], begin + stop + shift[stop]) for token, start, stop in placed]

    def _roles_by_beginnings(self, messages: Sequence[Message], ids: list[int]) -> npt.NDArray[np.uint8]:
        """For templates that mark nothing: an answer is what comes after the prompt that asks for it, where that
        prompt is the beginning of this very conversation, in tokens."""
        roles = np.full(len(ids), CONTEXT, np.uint8)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            begin, end = self.encode_prompt(messages[:number]), self._beginning(messages[: number + 1])
            if ids[: len(begin)] != begin or ids[: len(end)] != end or len(end) <= len(begin):
                raise DataError(
                    f"the template {self._template.name} does not render an answer behind the prompt that asks for "
                    f"it (message {number + 1}), so that nobody can say which tokens are its own: mark them in the "
                    "template with {% generation %} and {% endgeneration %}."
                )
            roles[len(begin) : len(end)] = ANSWER
        return roles

    def _beginning(self, messages: Sequence[Message]) -> list[int]:
        return [token for token, _, _ in self.place(render(self._template, messages, self._names))]

    def _length_of_beginning(self, messages: Sequence[Message], whole: Rendered) -> int:
        """Characters of the first messages."""
        begin = render(self._template, messages, self._names).text
        if not whole.text.startswith(begin):
            raise DataError(
                f"the template {self._template.name} renders the beginning of a conversation otherwise than the "
                "whole: paths of a tree cannot share answers with it. Take another template."
            )
        return len(begin)

    def _check(self, ids: list[int], roles: npt.NDArray[np.uint8]) -> None:
        trained = roles == ANSWER
        if not trained.any():
            raise DataError(f"the template {self._template.name} leaves no token to train (a mask of 0 %)")
        if trained.all():
            raise DataError(f"the template {self._template.name} marks every token as an answer (a mask of 100 %)")
        ends = np.flatnonzero(trained & ~np.append(trained[1:], False))
        for end in ends.tolist():
            if self._last_special(ids, roles, end) != self.turn_end_id:
                raise DataError(
                    f"the template {self._template.name} ends an answer without its turn-end token "
                    f"{self._tokenizer.special_tokens()[self.turn_end_id]}: a model would not learn to stop"
                )

    def _last_special(self, ids: list[int], roles: npt.NDArray[np.uint8], end: int) -> int | None:
        """The special token that ends the answer whose last token is at ``end``; white space may follow it."""
        while end >= 0 and roles[end] == ANSWER:
            if ids[end] in self._specials:
                return ids[end]
            if self._tokenizer.decode([ids[end]]).strip():
                return None
            end -= 1
        return None

    def _find_turn_end(self) -> int:
        rendered = render(self._template, _PROBE, self._names)
        placed = self.place(rendered)
        ids = [token for token, _, _ in placed]
        marked = self._template.marks_answers
        roles = _roles(placed, rendered.answers) if marked else self._roles_by_beginnings(_PROBE, ids)
        trained = np.flatnonzero(roles == ANSWER)
        found = self._last_special(ids, roles, int(trained[-1])) if len(trained) else None
        if found is None:
            raise DataError(
                f"the template {self._template.name} ends an answer with no special token of "
                f"{self._tokenizer.files[0]}: a model trained with it would never stop. Take a template with one."
            )
        return found


def _roles(placed: Placed, answers: Sequence[tuple[int, int]]) -> npt.NDArray[np.uint8]:
    """ANSWER where a token stands for any character of an answer."""
    starts = np.array([start for _, start, _ in placed])
    ends = np.array([max(end, start + 1) for _, start, end in placed])
    roles = np.full(len(placed), CONTEXT, np.uint8)
    for begin, end in answers:
        roles[(starts < end) & (ends > begin)] = ANSWER
    return roles


def _with_margins(
    names: Sequence[str], ids: dict[str, int], margins: dict[int, tuple[bool, bool]]
) -> re.Pattern[str] | None:
    """Finds special tokens, with the white space that some of them swallow."""
    if not names:
        return None
    before = "|".join(re.escape(name) for name in names if margins.get(ids[name], (False, False))[0])
    behind = "".join(rf"(?:(?<={re.escape(name)})\s+)?" for name in names if margins.get(ids[name], (False, False))[1])
    leading = rf"(?:\s+(?={before}))?" if before else ""
    return re.compile(f"{leading}(?P<name>{'|'.join(map(re.escape, names))}){behind}")
