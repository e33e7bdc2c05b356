"""A multiple-choice question, and what must be true of one. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from megatron_med.errors import DataError


@dataclass(frozen=True)
class Question:
    """A question with its options.

    Attributes:
        id: unlike any other of its file.
        question: text.
        options: letter -> text, from A on.
        answer: letter of the right one.
        context: what the question is about, such as an abstract; empty where there is none.
        subject: of the question; empty where the file names none.
        explanation: why the answer is right; empty where there is none.
    """

    id: str
    question: str
    options: Mapping[str, str]
    answer: str
    context: str = ""
    subject: str = ""
    explanation: str = ""

    @property
    def letters(self) -> list[str]:
        return list(self.options)

    @property
    def texts(self) -> list[str]:
        return list(self.options.values())

    def fields(self) -> dict[str, Any]:
        """What prompts are made of; ``gold`` counts from 0."""
        return {
            "id": self.id,
            "question": self.question,
            "options": [{"letter": letter, "text": text} for letter, text in self.options.items()],
            "letters": self.letters,
            "texts": self.texts,
            "answer": self.answer,
            "gold": self.letters.index(self.answer),
            "context": self.context,
            "subject": self.subject,
        }


def lettered(texts: Sequence[Any]) -> dict[str, str]:
    """Options by letter, from A on."""
    return {letter: str(text) for letter, text in zip(ascii_uppercase, texts, strict=False)}


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def checked(question: Question, place: str) -> Question:
    """The same question.

    Raises:
        DataError: it has fewer than two options, letters that do not follow each other, an empty text, or an answer
            that is none of its options.
    """
    texts = (question.question, question.context, question.answer, *question.options.values())
    if any(not _is_text(text) for text in texts):
        raise DataError(f"{place}: a text holds half of a character (a lone surrogate). Correct that record.")
    letters = question.letters
    expected = list(ascii_uppercase[: len(letters)])
    if len(letters) < 2:
        raise DataError(f"{place}: the question has {len(letters)} options, at least 2 are needed. Correct that.")
    if letters != expected:
        raise DataError(
            f"{place}: the options have the letters {', '.join(letters)}, not {', '.join(expected)}: one is missing or "
            "too many. Correct that record."
        )
    if question.answer not in question.options:
        raise DataError(
            f"{place}: the answer is {question.answer!r}, and the options are {', '.join(letters)}. Correct that "
            "record."
        )
    empty = [letter for letter, text in question.options.items() if not text.strip()]
    if empty or not question.question.strip():
        raise DataError(f"{place}: {f'option {empty[0]}' if empty else 'the question'} is empty. Correct that record.")
    return question
