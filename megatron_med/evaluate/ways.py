"""Ways of scoring a question: what the model is given, and how its answer is read.

A way either compares log-likelihoods of continuations or lets the model write and reads an answer in that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_med.evaluate import prompts
from megatron_med.evaluate.catalogue import Task
from megatron_med.evaluate.parsing import after_answer_is, exact_text, first_word, majority, medalpaca_letter
from megatron_med.evaluate.questions import Question
from megatron_med.inference.sampling import GREEDY, Sampling

_THOUGHT_TOKENS = 1024
"""Tokens of a chain of thought, as Meditron has it."""
_TEXT_TOKENS = 128
"""Tokens of MedAlpaca's and of BioMed-LLaMA's written answers."""
_SHOT_TOKENS = 8
"""Tokens after the answer's own that Meditron lets a model write behind shots."""
_TRIES = 5


@dataclass(frozen=True)
class Writing:
    """What the model is to write.

    Attributes:
        prompt: text.
        tokens: that it may write.
        count: how often, with different draws.
        sampling: how tokens are chosen.
        stop: texts that end it.
        is_message: the prompt is a user's message where the model has a chat template.
    """

    prompt: str
    tokens: int
    count: int = 1
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    is_message: bool = False


@dataclass(frozen=True)
class Reading:
    """What was read in a model's answer.

    Attributes:
        letters: by name of the metric; None where nothing could be read.
        notes: what else a sample should tell.
    """

    letters: Mapping[str, str | None]
    notes: Mapping[str, Any] = field(default_factory=dict)


class Way(ABC):
    """A way of scoring. ``name`` is what ``--score`` takes."""

    name: str


class LikelihoodWay(Way):
    """The most likely continuation is the answer."""

    @abstractmethod
    def choices(self, task: Task, question: Question, shots: Sequence[Question]) -> tuple[str, list[str]]:
        """Prompt and continuations, in the order of the letters."""

    def read(
        self, question: Question, continuations: Sequence[str], scores: Sequence[float], tokens: Sequence[int]
    ) -> Reading:
        """The answer.

        Args:
            question: with its letters.
            continuations: as ``choices`` gave them.
            scores: log-likelihood of each.
            tokens: of each.
        """
        return Reading({self.name: _best(question, scores)})


class HeadWay(Way):
    """The best score of the model's own head, for models that have one."""

    name = "head"


class WrittenWay(Way):
    """The answer is read in what the model writes."""

    @abstractmethod
    def writing(self, task: Task, question: Question, shots: Sequence[Question], longest: int) -> Writing:
        """What to write; ``longest`` is the tokens of the longest answer itself (a letter, or yes, no, maybe)."""

    @abstractmethod
    def read(self, task: Task, question: Question, outputs: Sequence[str]) -> Reading:
        """The answer."""

    def wants_more(self, task: Task, question: Question, outputs: Sequence[str]) -> bool:
        """Whether the model is to try again."""
        return False


def _best(question: Question, scores: Sequence[float]) -> str:
    return question.letters[max(range(len(scores)), key=lambda place: scores[place])]


class Letter(LikelihoodWay):
    """The answer's letter behind question and options (yes, no, maybe for PubMedQA), as in lm-eval's tasks."""

    name = "letter"

    def choices(self, task: Task, question: Question, shots: Sequence[Question]) -> tuple[str, list[str]]:
        return _harness_prompt(task, question, shots, task.choices), [f" {text}" for text in task.choices(question)]


class Option(LikelihoodWay):
    """The option's text behind question and options: by the sum, and divided by characters or by tokens."""

    name = "option"

    def choices(self, task: Task, question: Question, shots: Sequence[Question]) -> tuple[str, list[str]]:
        prompt = _harness_prompt(task, question, shots, lambda asked: asked.texts)
        return prompt, [f" {text}" for text in question.texts]

    def read(
        self, question: Question, continuations: Sequence[str], scores: Sequence[float], tokens: Sequence[int]
    ) -> Reading:
        return _three_ways(self.name, question, scores, [len(text.lstrip()) for text in continuations], tokens)


class BioMedLlama(LikelihoodWay):
    """BioMed-LLaMA's zero-shot prompt, without the options; PubMedQA's answers are Yes, No, Maybe without a space."""

    name = "biomed_llama"

    def choices(self, task: Task, question: Question, shots: Sequence[Question]) -> tuple[str, list[str]]:
        examples = ""
        for shot in shots:
            examples += f"{prompts.biomed_llama(shot)}{_ends(task, shot)[shot.letters.index(shot.answer)]}\n\n"
        return examples + prompts.biomed_llama(question), _ends(task, question)

    def read(
        self, question: Question, continuations: Sequence[str], scores: Sequence[float], tokens: Sequence[int]
    ) -> Reading:
        return _three_ways(self.name, question, scores, [len(text.lstrip()) for text in continuations], tokens)


def _ends(task: Task, question: Question) -> list[str]:
    """BioMed-LLaMA's continuations."""
    return [text.capitalize() if task.answers == "texts" else f" {text}" for text in question.texts]


class TopToken(WrittenWay):
    """Meditron's: the most likely next token behind its instruction and the question; a few tokens more with shots."""

    name = "top_token"

    def writing(self, task: Task, question: Question, shots: Sequence[Question], longest: int) -> Writing:
        sampling = Sampling(frequency_penalty=1.0)
        prompt = prompts.meditron(task, question, shots, prompts.ANSWER)
        tokens = longest + (_SHOT_TOKENS if shots else 0)
        return Writing(prompt, tokens, 1, sampling, (prompts.STOP,), is_message=True)

    def read(self, task: Task, question: Question, outputs: Sequence[str]) -> Reading:
        return Reading({self.name: first_word(outputs[0], task, question)})


class ChainOfThought(WrittenWay):
    """Step by step; the answer stands behind "The answer is:"."""

    name = "cot"

    def writing(self, task: Task, question: Question, shots: Sequence[Question], longest: int) -> Writing:
        prompt = prompts.meditron(task, question, shots, prompts.STEP_BY_STEP)
        sampling = Sampling(frequency_penalty=1.0)
        return Writing(prompt, _THOUGHT_TOKENS, 1, sampling, (prompts.STOP,), is_message=True)

    def read(self, task: Task, question: Question, outputs: Sequence[str]) -> Reading:
        return Reading({self.name: after_answer_is(outputs[0], task, question)})


class SelfConsistency(ChainOfThought):
    """Several chains of thought at temperature 0.8; the majority of the answers that could be read."""

    name = "self_consistency"

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def writing(self, task: Task, question: Question, shots: Sequence[Question], longest: int) -> Writing:
        prompt = prompts.meditron(task, question, shots, prompts.STEP_BY_STEP)
        sampling = Sampling(0.8, frequency_penalty=1.0)
        return Writing(prompt, _THOUGHT_TOKENS, self._samples, sampling, (prompts.STOP,), is_message=True)

    def read(self, task: Task, question: Question, outputs: Sequence[str]) -> Reading:
        answers = [after_answer_is(output, task, question) for output in outputs]
        vote = majority(answers)
        return Reading({self.name: vote.letter}, {"answers": answers, "tie": vote.is_tie})


class MedAlpaca(WrittenWay):
    """MedAlpaca's sampled answers: up to five tries until a letter can be read."""

    name = "medalpaca"

    def writing(self, task: Task, question: Question, shots: Sequence[Question], longest: int) -> Writing:
        sampling = Sampling(0.4, top_k=50, top_p=0.9)
        return Writing(prompts.medalpaca(question), _TEXT_TOKENS, 1, sampling)

    def read(self, task: Task, question: Question, outputs: Sequence[str]) -> Reading:
        return Reading({self.name: medalpaca_letter(outputs[-1], question)}, {"tries": len(outputs)})

    def wants_more(self, task: Task, question: Question, outputs: Sequence[str]) -> bool:
        return len(outputs) < _TRIES and medalpaca_letter(outputs[-1], question) is None


class WrittenText(WrittenWay):
    """BioMed-LLaMA's tuned models: the option's text is written, and compared as a string."""

    name = "text"

    def writing(self, task: Task, question: Question, shots: Sequence[Question], longest: int) -> Writing:
        return Writing(prompts.biomed_llama_text(question), _TEXT_TOKENS)

    def read(self, task: Task, question: Question, outputs: Sequence[str]) -> Reading:
        return Reading({self.name: exact_text(outputs[0], question)})


WITHOUT_SHOTS = ("cot", "self_consistency", "medalpaca", "text", "head")
"""Ways that no published system asks behind examples."""
WITHOUT_ORDER = ("biomed_llama", "head")
"""Ways that show the model one option at a time."""
NAMES = ("letter", "option", "biomed_llama", "top_token", "cot", "self_consistency", "medalpaca", "text", "head")


def make_way(name: str, samples: int) -> Way:
    """A way by its name; ``samples`` are the chains of self-consistency."""
    made = (Letter(), Option(), BioMedLlama(), TopToken(), ChainOfThought(), SelfConsistency(samples), MedAlpaca())
    return next(way for way in (*made, WrittenText(), HeadWay()) if way.name == name)


def _harness_prompt(task: Task, question: Question, shots: Sequence[Question], answers: Any) -> str:
    """Description, shots with their answers, question: as lm-eval puts them together."""
    text = task.render(task.description, question) if task.description else ""
    for shot in shots:
        text += f"{task.render(task.prompt, shot)} {answers(shot)[shot.letters.index(shot.answer)]}\n\n"
    return text + task.render(task.prompt, question)


def _three_ways(
    name: str, question: Question, scores: Sequence[float], characters: Sequence[int], tokens: Sequence[int]
) -> Reading:
    by_character = [score / max(1, count) for score, count in zip(scores, characters, strict=True)]
    by_token = [score / max(1, count) for score, count in zip(scores, tokens, strict=True)]
    return Reading(
        {
            f"{name}.sum": _best(question, scores),
            f"{name}.per_character": _best(question, by_character),
            f"{name}.per_token": _best(question, by_token),
        }
    )
