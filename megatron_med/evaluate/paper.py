"""A task with the questions, texts and examples of its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_med.errors import ConfigError
from megatron_med.evaluate.catalogue import TEST, TRAIN, Task, files_beside, find_file, load_task, read_questions
from megatron_med.evaluate.fewshot import apart_from
from megatron_med.evaluate.options import Options
from megatron_med.evaluate.questions import Question
from megatron_med.evaluate.readers import texts_of
from megatron_med.evaluate.summaries import Summary, read_summaries


@dataclass(frozen=True)
class Paper:
    """A task with what is asked.

    Attributes:
        questions: empty for perplexity.
        texts: id and text of each document, for perplexity.
        summaries: texts to sum up.
        left_out: questions of the training split that are asked, too, and no examples.
        training: what examples are drawn from.
        files: of the test and, where examples are drawn, of the training split.
    """

    task: Task
    questions: Sequence[Question]
    texts: Sequence[tuple[str, str]]
    training: Sequence[Question]
    files: Sequence[Path]
    summaries: Sequence[Summary] = ()
    left_out: int = 0


def read_paper(given: str, options: Options) -> Paper:
    """Reads ``TASK`` or ``TASK=FILE``.

    Raises:
        UserError: there is no such task or file, or what it holds cannot be asked.
    """
    name, _, file = given.partition("=")
    task = load_task(name)
    path = Path(file) if file else find_file(task, TEST, options.data or Path())
    if task.is_perplexity:
        return Paper(task, [], texts_of(path)[: options.limit], [], [path])
    if task.is_summary:
        return Paper(task, [], [], [], [path, *files_beside(task, path)], read_summaries(path)[: options.limit])
    questions = read_questions(task, TEST, path)
    if not options.shots:
        return Paper(task, questions[: options.limit], [], [], [path, *files_beside(task, path)])
    if task.shots_from is None:
        raise ConfigError(f"{name} has no training split to draw examples from: leave out --shots.")
    source = options.shots_from or find_file(task, TRAIN, options.data or path.parent)
    whole = read_questions(task, task.shots_from, source)
    training = apart_from(whole, questions, source, options.shots)
    files = [path, source, *files_beside(task, path)]
    return Paper(task, questions[: options.limit], [], training, files, left_out=len(whole) - len(training))
