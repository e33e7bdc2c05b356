"""The same question with its options in another order: a model that knows the answer gives it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_med.evaluate.catalogue import Task
from megatron_med.evaluate.questions import Question, lettered
from megatron_med.evaluate.results import ORDER
from megatron_med.evaluate.ways import LikelihoodWay, Reading, Way, Writing, WrittenWay


def moved(question: Question, by: int) -> Question:
    """Every option ``by`` places further down, the last ones on top; letters stay in their order."""
    texts = question.texts
    places = [(place - by) % len(texts) for place in range(len(texts))]
    answer = question.letters[(question.letters.index(question.answer) + by) % len(texts)]
    return replace(question, options=lettered([texts[place] for place in places]), answer=answer)


def reordered(way: Way, by: int) -> Way:
    """A way of scoring that shows the options in another order. Its answers are letters of the order of the file."""
    if isinstance(way, LikelihoodWay):
        return _MovedLikelihood(way, by)
    assert isinstance(way, WrittenWay), "a way compares or writes"
    return _MovedWriting(way, by)


class _MovedLikelihood(LikelihoodWay):
    """The continuations keep the order of the file, so that their scores can be read as ever."""

    def __init__(self, way: LikelihoodWay, by: int) -> None:
        self.name = f"{way.name}{ORDER}{by}"
        self._way = way
        self._by = by

    def choices(self, task: Task, question: Question, shots: Sequence[Question]) -> tuple[str, list[str]]:
        prompt, ends = self._way.choices(task, moved(question, self._by), shots)
        return prompt, [ends[(place + self._by) % len(ends)] for place in range(len(ends))]

    def read(
        self, question: Question, continuations: Sequence[str], scores: Sequence[float], tokens: Sequence[int]
    ) -> Reading:
        return _named(self._way.read(question, continuations, scores, tokens), self._by)


class _MovedWriting(WrittenWay):
    """What is read is brought back to the order of the file."""

    def __init__(self, way: WrittenWay, by: int) -> None:
        self.name = f"{way.name}{ORDER}{by}"
        self._way = way
        self._by = by

    def writing(self, task: Task, question: Question, shots: Sequence[Question], longest: int) -> Writing:
        return self._way.writing(task, moved(question, self._by), shots, longest)

    def read(self, task: Task, question: Question, outputs: Sequence[str]) -> Reading:
        reading = self._way.read(task, moved(question, self._by), outputs)
        letters = question.letters
        back = {
            name: letter and letters[(letters.index(letter) - self._by) % len(letters)]
            for name, letter in reading.letters.items()
        }
        return _named(replace(reading, letters=back), self._by)

    def wants_more(self, task: Task, question: Question, outputs: Sequence[str]) -> bool:
        return self._way.wants_more(task, moved(question, self._by), outputs)


def _named(reading: Reading, by: int) -> Reading:
    return replace(reading, letters={f"{name}{ORDER}{by}": letter for name, letter in reading.letters.items()})
