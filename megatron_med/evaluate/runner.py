"""Asks a model the questions of a task, block by block; what stands in the results is not asked again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_med.config.schema import MULTIPLE_CHOICE
from megatron_med.evaluate.catalogue import Task
from megatron_med.evaluate.language_model import Asked, MegatronMedLM
from megatron_med.evaluate.questions import Question
from megatron_med.evaluate.results import Key, Sample
from megatron_med.evaluate.summaries import SAMPLING, TOKENS, Summary, with_scores
from megatron_med.evaluate.ways import HeadWay, LikelihoodWay, Reading, Way, Writing, WrittenWay
from megatron_med.inference.scoring import Score
from megatron_med.parallel.random import seed_of

_BLOCK = 128
"""Questions after which samples are written: what a kill can cost."""

_CUT_TOKENS = 64
"""Tokens that are written after a prompt that was cut."""

Keep = Callable[[Sequence[Sample]], None]


@dataclass(frozen=True)
class Asking:
    """How questions are asked.

    Attributes:
        truncate: whether prompts that are too long are cut on the left; else they are counted, and wrong.
        seed: of what is drawn.
    """

    truncate: bool
    seed: int


def ask(
    model: MegatronMedLM,
    task: Task,
    questions: Sequence[Question],
    way: Way,
    shots: Sequence[Question],
    shots_seed: int,
    done: set[Key],
    asking: Asking,
    keep: Keep,
) -> None:
    """Asks what is not done yet.

    Args:
        model: on every rank.
        task, questions: what is asked.
        way: how.
        shots, shots_seed: examples in front, and the seed that they were drawn with; 0 without.
        done: keys of samples that stand already.
        asking: how.
        keep: takes the samples of a block.
    """
    left = [question for question in questions if (question.id, way.name, shots_seed) not in done]
    for start in range(0, len(left), _BLOCK):
        block = left[start : start + _BLOCK]
        if isinstance(way, LikelihoodWay):
            samples = _by_likelihood(model, task, block, way, shots, asking)
        elif isinstance(way, HeadWay):
            samples = _by_head(model, block, way)
        else:
            assert isinstance(way, WrittenWay), "a way compares or writes"
            samples = _by_writing(model, task, block, way, shots, asking)
        seed = {"seed": shots_seed} if shots else {}
        named = zip(block, samples, strict=True)
        keep([{"id": question.id, "score": way.name, **seed, **sample} for question, sample in named])


def _by_likelihood(
    model: MegatronMedLM,
    task: Task,
    block: Sequence[Question],
    way: LikelihoodWay,
    shots: Sequence[Question],
    asking: Asking,
) -> list[Sample]:
    choices = [way.choices(task, question, shots) for question in block]
    pairs = [[model.encode_pair(prompt, end) for end in ends] for prompt, ends in choices]
    fits = [asking.truncate or all(len(c) + len(e) <= model.max_length + 1 for c, e in some) for some in pairs]
    scores = iter(model.scores([pair for some, fit in zip(pairs, fits, strict=True) if fit for pair in some]))
    samples = []
    for question, (prompt, ends), some, fit in zip(block, choices, pairs, fits, strict=True):
        if not fit:
            names = way.read(question, ends, [0.0] * len(ends), [1] * len(ends)).letters
            samples.append(_too_long(question, prompt, dict.fromkeys(names)))
            continue
        found: list[Score] = [next(scores) for _ in some]
        values = [score.log_likelihood for score in found]
        reading = way.read(question, ends, values, [len(end) for _, end in some])
        samples.append({"prompt": prompt, "loglikelihoods": values, **_told(question, reading)})
    return samples


def _by_head(model: MegatronMedLM, block: Sequence[Question], way: HeadWay) -> list[Sample]:
    """Log-probabilities of the options, in the order of the letters."""
    encoder, form = model.head_encoder()
    sequences, cuts = [], []
    for question in block:
        before = encoder.cut
        sequences.append(encoder.sequences(question))
        cuts.append(encoder.cut > before)
    scores = iter(model.head_scores([ids for some in sequences for ids in some]))
    samples = []
    for question, some, cut in zip(block, sequences, cuts, strict=True):
        found = [next(scores) for _ in some]
        if form.kind == MULTIPLE_CHOICE:
            values = [score for (score,) in found]
        else:
            classes = [form.class_of(text, f"question {question.id}") for text in question.texts]
            values = [found[0][place] for place in classes]
        logarithms = log_softmax(values)
        best = question.letters[max(range(len(values)), key=lambda place: values[place])]
        prompt = "\n".join(str(model.tokenizer.decode(ids)) for ids in some)
        told = _told(question, Reading({way.name: best})) | ({"cut": True} if cut else {})
        samples.append({"prompt": prompt, "loglikelihoods": logarithms, **told})
    return samples


def log_softmax(values: Sequence[float]) -> list[float]:
    """Logarithms of probabilities whose logits are given."""
    highest = max(values)
    total = highest + math.log(sum(math.exp(value - highest) for value in values))
    return [value - total for value in values]


def _by_writing(
    model: MegatronMedLM,
    task: Task,
    block: Sequence[Question],
    way: WrittenWay,
    shots: Sequence[Question],
    asking: Asking,
) -> list[Sample]:
    writings = [way.writing(task, question, shots, _longest(model, task, question)) for question in block]
    texts = [model.as_message(one.prompt) if one.is_message else one.prompt for one in writings]
    rooms = [model.max_length - len(model.tok_encode(text)) for text in texts]
    fits = [room > 0 or asking.truncate for room in rooms]
    outputs: list[list[str]] = [[] for _ in block]
    places = [place for place, fit in enumerate(fits) if fit]
    counts = [writings[place].count for place in places]
    while places:
        asked = []
        for place, count in zip(places, counts, strict=True):
            for number in range(len(outputs[place]), len(outputs[place]) + count):
                asked.append(_asked(texts[place], writings[place], rooms[place], block[place], way, number, asking))
        written = iter(model.write(asked))
        for place, count in zip(places, counts, strict=True):
            outputs[place] += [next(written) for _ in range(count)]
        places = [place for place in places if way.wants_more(task, block[place], outputs[place])]
        counts = [1] * len(places)
    samples = []
    for question, text, fit, written_texts in zip(block, texts, fits, outputs, strict=True):
        if fit:
            reading = way.read(task, question, written_texts)
            samples.append({"prompt": text, "outputs": written_texts, **_told(question, reading)})
        else:
            samples.append(_too_long(question, text, {way.name: None}))
    return samples


def _asked(
    text: str, writing: Writing, room: int, question: Question, way: WrittenWay, number: int, asking: Asking
) -> Asked:
    tokens = min(writing.tokens, room if room > 0 else _CUT_TOKENS)
    seed = seed_of("evaluate", asking.seed, question.id, way.name, number)
    return Asked(text, tokens, writing.sampling, writing.stop, seed)


def _longest(model: MegatronMedLM, task: Task, question: Question) -> int:
    """Tokens of the longest answer itself."""
    return max(len(model.tok_encode(text, add_special_tokens=False)) for text in task.choices(question))


def _told(question: Question, reading: Reading) -> dict[str, Any]:
    letters = dict(reading.letters)
    first = next(iter(letters.values()))
    read = {"prediction": first, "gold": question.answer, "parsed": first is not None, "predictions": letters}
    return read | ({"subject": question.subject} if question.subject else {}) | dict(reading.notes)


def _too_long(question: Question, prompt: str, letters: dict[str, None]) -> Sample:
    return {"prompt": prompt, "outputs": [], "too_long": True, **_told(question, Reading(letters))}


def summarise(model: MegatronMedLM, texts: Sequence[Summary], done: set[Key], asking: Asking, keep: Keep) -> None:
    """Writes summaries by BioMedLM's beam search, behind the model's template where it has one."""
    left = [summary for summary in texts if (summary.id, "summary", 0) not in done]
    for start in range(0, len(left), _BLOCK):
        block = left[start : start + _BLOCK]
        prompts = [model.as_message(summary.source) for summary in block]
        rooms = [model.max_length - len(model.tok_encode(prompt)) for prompt in prompts]
        fits = [room > 0 or asking.truncate for room in rooms]
        asked = [
            Asked(prompt, min(TOKENS, room) if room > 0 else _CUT_TOKENS, SAMPLING, (), 0)
            for prompt, room, fit in zip(prompts, rooms, fits, strict=True)
            if fit
        ]
        written = iter(model.write(asked))
        samples = [
            {"id": summary.id, "score": "summary", **with_scores(summary, prompt, next(written) if fit else None)}
            for summary, prompt, fit in zip(block, prompts, fits, strict=True)
        ]
        keep(samples)


def rolling(model: MegatronMedLM, texts: Sequence[tuple[str, str]], done: set[Key], keep: Keep) -> None:
    """Log-likelihoods of whole texts."""
    left = [(name, text) for name, text in texts if (name, "perplexity", 0) not in done]
    for block in _blocks(left):
        totals = model.rolling([text for _, text in block])
        keep(
            [
                {"id": name, "score": "perplexity", "loglikelihood": total, "words": len(text.split())}
                for (name, text), total in zip(block, totals, strict=True)
            ]
        )


def _blocks(items: Sequence[tuple[str, str]]) -> Iterator[Sequence[tuple[str, str]]]:
    return (items[start : start + _BLOCK] for start in range(0, len(items), _BLOCK))
