"""Decontamination: finds documents that repeat questions of a benchmark, by the words they share in a row.

datatrove has such a filter; it reads its benchmarks through another framework, writes every number as 0 (so that any
table of numbers repeats any other), and cannot say which question was found.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.text import TextNormConfig, simplify_text

from megatron_med.corpus.recipe import Questions
from megatron_med.corpus.records import read_records
from megatron_med.errors import DataError
from megatron_med.files import write_json

BOILERPLATE = 10
"""An n-gram that this many questions of a benchmark share is phrasing ("which of the following is the most ..."); it
is sought all the same where a question has nothing else."""

SHORTEST = 8
"""A question of fewer words is not sought."""

_START = 3
"""Words that are compared first: hardly any place of a document has those of a question."""

_NORMALIZATION = TextNormConfig(norm_numbers=False, norm_weekdays=False, norm_monthnames=False)


def read_questions(questions: Questions) -> Iterator[list[str]]:
    """The texts of every question of a benchmark.

    Raises:
        DataError: a question has none of the fields; names the place.
    """
    path = Path(questions.path)
    for place, record in _records(path):
        found = [text for name in questions.fields for text in _texts(record.get(name))]
        if not found:
            raise DataError(f"{place}: none of the fields {', '.join(questions.fields)} holds text.")
        yield found


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix != ".json":
        yield from read_records(path)
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}. Give an intact file.") from error
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, record in items:
        if not isinstance(record, dict):
            raise DataError(f"{path}, record {key}: not an object.")
        yield f"{path}, record {key}", record


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def simplified_words(text: str) -> list[str]:
    """Words in lower case without punctuation and accents; numbers stay, they tell one case history from another."""
    return simplify_text(text, _NORMALIZATION).split()


def _grams(words: list[str], length: int) -> Iterator[str]:
    return (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))


def _is_prose(gram: str) -> bool:
    words = gram.split()
    return 2 * sum(word.isalpha() for word in words) >= len(words)


def write_index(name: str, questions: Questions, n_grams: int, folder: Path) -> dict[str, int]:
    """Writes what ``QuestionFilter`` looks for in one benchmark.

    A question of at least ``n_grams`` words is found by any ``n_grams`` of them in a row; a shorter one, of at least
    ``SHORTEST`` words, as a whole; one that is shorter still is not sought, because chance would find it.

    Returns:
        Numbers of questions, and of those too short to be found.
    """
    grams_of: list[set[str]] = []
    whole: dict[str, int] = {}
    for number, texts in enumerate(read_questions(questions)):
        grams_of.append(set())
        for words in map(simplified_words, texts):
            if SHORTEST <= len(words) < n_grams:
                whole.setdefault(" ".join(words), number)
            grams_of[number].update(filter(_is_prose, _grams(words, n_grams)))
    shared = Counter(gram for grams in grams_of for gram in grams)
    sought: dict[str, int] = {}
    for number, grams in enumerate(grams_of):
        telling = [gram for gram in grams if shared[gram] < BOILERPLATE] or grams
        for gram in sorted(telling):
            sought.setdefault(gram, number)
    found = {number for number, grams in enumerate(grams_of) if grams} | set(whole.values())
    folder.mkdir(parents=True, exist_ok=True)
    index = {"benchmark": name, "n_grams": n_grams, "grams": sought, "whole": whole}
    write_json(folder / f"{name}.json", index, indent=None)
    return {"questions": len(grams_of), "too_short_to_be_found": len(grams_of) - len(found)}


class QuestionFilter(BaseFilter):
    """Drops documents that repeat a benchmark question, and tells which one and in what words.

    Args:
        folder: of ``write_index``.
    """

    name = "contamination"

    def __init__(self, folder: Path, exclusion_writer: DiskWriter | None = None) -> None:
        super().__init__(exclusion_writer)
        self.folder = folder
        self._sought: dict[int, dict[str, list[tuple[str, int, str]]]] = {}
        self._starts: set[tuple[str, ...]] = set()

    def _load(self) -> None:
        """By length, the first words of what is sought: benchmark, question, all of its words."""
        for file in sorted(self.folder.glob("*.json")):
            index = json.loads(file.read_text(encoding="utf-8"))
            name = index["benchmark"]
            for gram, number in index["grams"].items():
                self._sought.setdefault(index["n_grams"], {}).setdefault(gram, []).append((name, number, gram))
            for text, number in index["whole"].items():
                start = " ".join(text.split()[:SHORTEST])
                self._sought.setdefault(SHORTEST, {}).setdefault(start, []).append((name, number, text))
        self._starts = {tuple(gram.split()[:_START]) for sought in self._sought.values() for gram in sought}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if not self._sought:
            self._load()
        words = simplified_words(doc.text)
        columns = (words[place:] for place in range(_START))
        for start, first_words in enumerate(zip(*columns, strict=False)):
            if first_words in self._starts:
                found = self._found_at(words, start)
                if found:
                    doc.metadata["contamination"] = found
                    return False, f"contaminated: {found['benchmark']}"
        return True

    def _found_at(self, words: list[str], start: int) -> dict[str, Any] | None:
        for length, sought in self._sought.items():
            for benchmark, number, text in sought.get(" ".join(words[start : start + length]), []):
                if " ".join(words[start : start + len(text.split())]) == text:
                    return {"benchmark": benchmark, "question": number, "words": text}
        return None
