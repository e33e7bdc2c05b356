"""Questions as the sequences that a head scores: BioMedLM's form (arXiv 2403.18421 and its published scripts)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_med.config.schema import MULTIPLE_CHOICE
from megatron_med.data.head_form import HeadForm
from megatron_med.errors import ConfigError
from megatron_med.evaluate.questions import Question
from megatron_med.tokenizer import Tokenizer


class HeadEncoder:
    """Makes the sequences.

    Args:
        form: how.
        tokenizer: of the model.

    Attributes:
        cut: sequences so far that were too long.

    Raises:
        ConfigError: the separator is no special token.
    """

    def __init__(self, form: HeadForm, tokenizer: Tokenizer) -> None:
        self.cut = 0
        self._form = form
        self._tokenizer = tokenizer
        self._separator: list[int] = []
        if form.separator:
            special = {name: number for number, name in tokenizer.special_tokens().items()}
            if form.separator not in special:
                raise ConfigError(
                    f"the separator {form.separator!r} is no special token of {tokenizer.files[0]}. Add it "
                    "(megatron-med extend-tokenizer --tokens biomedlm_heads) and import the base with that tokenizer, "
                    "or pass --separator ''."
                )
            self._separator = [special[form.separator]]

    def sequences(self, question: Question) -> list[list[int]]:
        """A sequence for every option, or the only one of a text: context, question and, of a choice, the option."""
        asked = " ".join(part for part in (question.context, question.question) if part)
        if self._form.kind == MULTIPLE_CHOICE:
            return [self._joined(asked, f" {text}") for text in question.texts]
        if question.context and self._form.separator:
            return [self._joined(question.context, question.question)]
        return [self._joined(asked, "")]

    def _joined(self, first: str, second: str) -> list[int]:
        parts = [self._tokenizer.encode(text) + self._separator for text in (first, second) if text]
        self.cut += sum(map(len, parts)) > self._form.max_length
        if len(parts) == 1:
            return parts[0][: self._form.max_length]
        a, b = cut_longest_first(len(parts[0]), len(parts[1]), self._form.max_length)
        return parts[0][:a] + parts[1][:b]


def cut_longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two parts, cut token by token from the longer one until both fit: transformers' ``longest_first``."""
    over = first + second - room
    if over <= 0:
        return first, second
    shorter = min(first, second)
    if abs(first - second) >= over:
        return (first - over, second) if first > second else (first, second - over)
    shorter = room // 2
    return (room - shorter, shorter) if first >= second else (shorter, room - shorter)


def labels_of(questions: Sequence[Question]) -> tuple[str, ...]:
    """All options of all questions, in the order in which they come."""
    return tuple(dict.fromkeys(text for question in questions for text in question.texts))
