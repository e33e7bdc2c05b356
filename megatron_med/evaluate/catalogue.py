"""The tasks: YAML files that lm-eval reads, too, each with its prompt, its reader, and where to get its file. No torch
here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml

from megatron_med.errors import ConfigError, DataError
from megatron_med.evaluate.questions import Question
from megatron_med.evaluate.readers import MMLU_SUBJECTS, READERS, texts_of
from megatron_med.evaluate.summaries import read_summaries

FOLDER = Path(__file__).parent / "tasks"
TEST, TRAIN = "test", "train"
_TEXTS = "texts"
_SUMMARIES = "summaries"


@dataclass(frozen=True)
class Task:
    """A question set, texts whose perplexity is asked for, or texts to sum up.

    Attributes:
        name: of the YAML file.
        prompt: Jinja, of the fields of a question.
        description: in front of all shots; Jinja, too.
        answers: what the model chooses among: ``letters`` or ``texts`` of the options.
        reader: key of ``READERS``; ``texts`` for perplexity, ``summaries`` for texts to sum up.
        options: that every question has; None: they differ.
        instructions: key of Meditron's instruction strings.
        source: where to get the file.
        files: split -> patterns of file names.
        shots_from: split that few-shot examples come from; None: there are none.
    """

    name: str
    prompt: str
    description: str
    answers: str
    reader: str
    options: int | None
    instructions: str
    source: str
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)
    shots_from: str | None = None

    @property
    def is_perplexity(self) -> bool:
        return self.reader == _TEXTS

    @property
    def is_summary(self) -> bool:
        return self.reader == _SUMMARIES

    def render(self, template: str, question: Question) -> str:
        """A template filled in."""
        return _compiled(template).render(**question.fields())

    def choices(self, question: Question) -> list[str]:
        """What the model chooses among, in the order of the letters."""
        return question.letters if self.answers == "letters" else question.texts

    def gold(self, question: Question) -> str:
        """The right one of ``choices``."""
        return self.choices(question)[question.letters.index(question.answer)]


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's YAML without its functions."""


_Loader.add_constructor("!function", lambda loader, node: node.value)


@cache
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template)


def task_names() -> list[str]:
    """Names of all tasks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_task(name: str) -> Task:
    """A task by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in task_names():
        raise ConfigError(f"--tasks names {name!r}: there are {', '.join(task_names())}.")
    content = yaml.load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), _Loader)
    metadata = content["metadata"]
    return Task(
        name=name,
        prompt=content["doc_to_text"],
        description=content.get("description", ""),
        answers=content.get("doc_to_choice", "letters"),
        reader=metadata["reader"],
        options=metadata.get("options"),
        instructions=metadata.get("instructions", "mcq"),
        source=metadata["source"],
        files=metadata["files"],
        shots_from=content.get("fewshot_split"),
    )


def find_file(task: Task, split: str, data: Path) -> Path:
    """The file of a split below a folder; ``data`` itself where it is a file.

    Raises:
        DataError: there is none, or there are several.
    """
    if data.is_file():
        return data
    if not data.is_dir():
        raise DataError(f"--data is {data}: there is no such folder. Check the path.")
    found = _matches(task.files.get(split, ()), data)
    if split == TEST:
        both = set(task.files.get(TEST, ())) & set(task.files.get(TRAIN, ()))  # of files that hold both splits
        training = set(_matches(task.files.get(TRAIN, ()), data)) - {path for one in both for path in data.rglob(one)}
        found = [path for path in found if path not in training]
    if not found:
        names = " or ".join(task.files.get(split, ["none"]))
        option = f"--tasks {task.name}=FILE" if split == TEST else "--shots-from FILE"
        raise DataError(
            f"{data} holds no {split} file of {task.name} (such as {names}). Name it: {option}. Where it comes from: "
            f"{task.source}."
        )
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(data)) for path in found[:4])
        raise DataError(f"{data} holds several files of {task.name}: {names}. Name one: --tasks {task.name}=FILE.")
    return found[0]


def files_beside(task: Task, path: Path) -> list[Path]:
    """Other files that a reader takes beside the one that is named: answers, official splits, further subjects."""
    beside = {
        "usmle": [f"{path.stem}_solutions.json"],
        "pubmedqa": ["test_ground_truth.json"],
        "mmlu_medical": [f"{subject}_{TEST}.csv" for subject in MMLU_SUBJECTS] if path.suffix == ".csv" else [],
        "summaries": [f"{path.stem}.target"] if path.suffix == ".source" else [],
    }
    files = (path.with_name(name) for name in beside.get(task.reader, []))
    return [file for file in files if file.is_file() and file != path]


def _matches(patterns: Sequence[str], data: Path) -> list[Path]:
    """Files that the first pattern with any matches."""
    for pattern in patterns:
        found = sorted(path for path in data.rglob(pattern) if path.is_file())
        if found:
            return found
    return []


def read_questions(task: Task, split: str, path: Path) -> list[Question]:
    """The questions of a file, with ids of their own.

    Raises:
        DataError: there are none, two have the same id, or one has another number of options than the task.
    """
    try:
        questions = READERS[task.reader](path, split)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise DataError(
            f"{path} cannot be read as {task.name} ({type(error).__name__}: {error}). Get the whole file, in the "
            f"form of {task.source}."
        ) from error
    if not questions:
        raise DataError(
            f"{path} holds no question of {task.name}'s split {split}: the split is empty. Get the whole file."
        )
    seen: set[str] = set()
    for question in questions:
        if task.options is not None and len(question.options) != task.options:
            raise DataError(
                f"{path}: question {question.id} has {len(question.options)} options, and {task.name} has "
                f"{task.options}. Give the right file."
            )
        if question.id in seen:
            raise DataError(f"{path}: two questions have the id {question.id}. Make them different.")
        seen.add(question.id)
    return questions


def rows_of(metadata: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """For lm-eval: the rows of every split that the folder ``metadata["data"]`` has a file for.

    Raises:
        DataError: no folder is given, or it has no test file.
    """
    task = next(task for task in map(load_task, task_names()) if task.files == metadata["files"])
    if "data" not in metadata:
        raise DataError(f'{task.name} reads local files: pass --metadata \'{{"data": "DIR"}}\'.')
    data = Path(metadata["data"])
    test = find_file(task, TEST, data)
    if task.is_perplexity:
        return {TEST: [{"id": name, "text": text} for name, text in texts_of(test)]}
    if task.is_summary:
        return {TEST: [summary.fields() for summary in read_summaries(test)]}
    rows = {TEST: [question.fields() for question in read_questions(task, TEST, test)]}
    split = task.shots_from
    if split is not None:
        there = bool(_matches(task.files.get(TRAIN, ()), data))  # else no examples can be drawn; lm-eval wants a split
        training = read_questions(task, split, find_file(task, TRAIN, data)) if there else []
        rows[split] = [question.fields() for question in training]
    return rows
