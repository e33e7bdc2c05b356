"""The answer in what a model has written. No torch here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_med.evaluate.catalogue import Task
from megatron_med.evaluate.questions import Question

_NO_WORDS = re.compile(r"[^a-zA-Z0-9]+")
_MEDALPACA = re.compile(r"[A-Z](:|\.|) .+")
_DOUBLED = {"yesyes": "yes", "nono": "no", "yesno": "yes", "noyes": "no"}
"""Meditron's scorer reads these so."""


def first_word(text: str, task: Task, question: Question) -> str | None:
    """The letter that a text begins with, or the letter of the option's text where the task has yes, no and maybe.

    What comes behind an empty line belongs to a question that the model has made up. Meditron's scorer takes the first
    character of any word ("Because" for B) and never accepts "maybe"; here a word is a letter or it is not, and "maybe"
    is an answer.
    """
    words = _NO_WORDS.sub(" ", text.split("\n\n")[0] if text.strip() else "").split()
    return _answer(words[0], task, question) if words else None


def after_answer_is(text: str, task: Task, question: Question) -> str | None:
    """The answer behind the last "answer is"."""
    parts = re.split("answer is", re.sub(r"\s+", " ", text), flags=re.IGNORECASE)
    words = _NO_WORDS.sub(" ", parts[-1]).split() if len(parts) > 1 else []
    return _answer(words[0], task, question) if words else None


def _answer(word: str, task: Task, question: Question) -> str | None:
    if task.answers == "texts":
        word = _DOUBLED.get(word.lower(), word.lower())
        return next((letter for letter, text in question.options.items() if text.lower() == word), None)
    return word.upper() if word.upper() in question.options else None


def medalpaca_letter(text: str, question: Question) -> str | None:
    """The letter in front of an answer such as ``A: text``, without signs around it."""
    stripped = re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9]+$", "", text.split("### Instruction:")[0])
    if not _MEDALPACA.match(stripped):
        return None
    return stripped[0] if stripped[0] in question.options else None


def exact_text(text: str, question: Question) -> str | None:
    """The option whose text was written, and nothing else (BioMed-LLaMA)."""
    written = text.lstrip("( ").strip(" )")
    options = ((letter, option.lstrip("( ").strip(" )")) for letter, option in question.options.items())
    return next((letter for letter, option in options if option == written), None)


@dataclass(frozen=True)
class Vote:
    """A majority.

    Attributes:
        letter: the most frequent answer, the first of equals; None where there is none.
        is_tie: another answer is as frequent.
    """

    letter: str | None
    is_tie: bool


def majority(answers: Sequence[str | None]) -> Vote:
    """The vote over the answers that could be read."""
    counts = Counter(answer for answer in answers if answer is not None).most_common(2)
    if not counts:
        return Vote(None, False)
    return Vote(counts[0][0], len(counts) > 1 and counts[0][1] == counts[1][1])
