"""Decontamination: finds documents that repeat questions of a benchmark, by the words they share in a row.

datatrove has such a filter; it reads its benchmarks through another framework, writes every number as 0 (so that any
table of numbers repeats any other), and cannot say which question was found.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Sought:
    """What tells the questions of a benchmark: words in a row, with the numbers of the questions that have them.

    Attributes:
        questions: how many there are.
        n_grams: words of each of ``grams``.
        grams: a question of at least ``n_grams`` words is found by any of these.
        whole: a shorter one, of at least ``SHORTEST`` words, as a whole; one that is shorter still is not sought,
            because chance would find it.
    """

    questions: int
    n_grams: int
    grams: dict[str, list[int]]
    whole: dict[str, list[int]]

    @property
    def too_short(self) -> list[int]:
        """Numbers of the questions that are not sought."""
        sought = {number for numbers in (*self.grams.values(), *self.whole.values()) for number in numbers}
        return [number for number in range(self.questions) if number not in sought]


def what_tells(questions: Iterable[list[str]], n_grams: int) -> Sought:
    """Looks for words that a question shares with few others.

    Args:
        questions: the texts of each.
        n_grams: words in a row.
    """
    grams_of: list[set[str]] = []
    whole: dict[str, list[int]] = {}
    for number, texts in enumerate(questions):
        grams_of.append(set())
        for words in map(simplified_words, texts):
            if SHORTEST <= len(words) < n_grams:
                whole.setdefault(" ".join(words), []).append(number)
            grams_of[number].update(filter(_is_prose, _grams(words, n_grams)))
    shared = Counter(gram for grams in grams_of for gram in grams)
    sought: dict[str, list[int]] = {}
    for number, grams in enumerate(grams_of):
        telling = [gram for gram in grams if shared[gram] < BOILERPLATE] or grams
        for gram in sorted(telling):
            sought.setdefault(gram, []).append(number)
    return Sought(len(grams_of), n_grams, sought, whole)


def write_index(name: str, questions: Questions, n_grams: int, folder: Path) -> dict[str, int]:
    """Writes what ``QuestionFilter`` looks for in one benchmark.

    Returns:
        Numbers of questions, and of those too short to be found.
    """
    sought = what_tells(read_questions(questions), n_grams)
    grams, whole = ({text: numbers[0] for text, numbers in found.items()} for found in (sought.grams, sought.whole))
    folder.mkdir(parents=True, exist_ok=True)
    index = {"benchmark": name, "n_grams": n_grams, "grams": grams, "whole": whole}
    write_json(folder / f"{name}.json", index, indent=None)
    return {"questions": sought.questions, "too_short_to_be_found": len(sought.too_short)}


class QuestionSearch:
    """Finds, in the words of a document, what tells questions."""

    def __init__(self) -> None:
        self._sought: dict[int, dict[str, list[tuple[str, int, str]]]] = {}
        self._starts: set[tuple[str, ...]] = set()

    @property
    def is_empty(self) -> bool:
        return not self._sought

    def seek_gram(self, benchmark: str, number: int, gram: str, n_grams: int) -> None:
        """Adds ``n_grams`` words in a row of a question."""
        self._seek(n_grams, gram, (benchmark, number, gram))

    def seek_whole(self, benchmark: str, number: int, text: str) -> None:
        """Adds a question that is found as a whole."""
        self._seek(SHORTEST, " ".join(text.split()[:SHORTEST]), (benchmark, number, text))

    def _seek(self, length: int, first_words: str, found: tuple[str, int, str]) -> None:
        self._sought.setdefault(length, {}).setdefault(first_words, []).append(found)
        self._starts.add(tuple(first_words.split()[:_START]))

    def hits(self, words: list[str]) -> Iterator[tuple[str, int, str]]:
        """Benchmark, question, and the words that were found, from the beginning of the document on."""
        columns = (words[place:] for place in range(_START))
        for start, first_words in enumerate(zip(*columns, strict=False)):
            if first_words in self._starts:
                yield from self._at(words, start)

    def _at(self, words: list[str], start: int) -> Iterator[tuple[str, int, str]]:
        for length, sought in self._sought.items():
            for benchmark, number, text in sought.get(" ".join(words[start : start + length]), []):
                if " ".join(words[start : start + len(text.split())]) == text:
                    yield benchmark, number, text


class QuestionFilter(BaseFilter):
    """Drops documents that repeat a benchmark question, and tells which one and in what words.

    Args:
        folder: of ``write_index``.
    """

    name = "contamination"

    def __init__(self, folder: Path, exclusion_writer: DiskWriter | None = None) -> None:
        super().__init__(exclusion_writer)
        self.folder = folder
        self._search = QuestionSearch()

    def _load(self) -> None:
        for file in sorted(self.folder.glob("*.json")):
            index = json.loads(file.read_text(encoding="utf-8"))
            for gram, number in index["grams"].items():
                self._search.seek_gram(index["benchmark"], number, gram, index["n_grams"])
            for text, number in index["whole"].items():
                self._search.seek_whole(index["benchmark"], number, text)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._search.is_empty:
            self._load()
        found = next(self._search.hits(simplified_words(doc.text)), None)
        if found is None:
            return True
        benchmark, number, text = found
        doc.metadata["contamination"] = {"benchmark": benchmark, "question": number, "words": text}
        return False, f"contaminated: {benchmark}"
