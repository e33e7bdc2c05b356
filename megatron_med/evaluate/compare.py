"""Several results folders side by side, with what was published, and tests between them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from megatron_med.errors import DataError
from megatron_med.evaluate.judged import Judged, judge
from megatron_med.evaluate.results import ORDER, RESULTS, Sample, read_samples, samples_file
from megatron_med.evaluate.statistics import mcnemar

Cells = dict[str, tuple[float, list[float] | None]]
PUBLISHED = Path(__file__).parent / "published.yaml"


@dataclass(frozen=True)
class Run:
    """One results folder.

    Attributes:
        name: short, unlike any other.
        folder: where it is.
        content: of ``results.json``.
        samples: by task.
    """

    name: str
    folder: Path
    content: dict[str, Any]
    samples: dict[str, list[Sample]]

    @property
    def tasks(self) -> dict[str, Any]:
        return self.content["tasks"]

    def asked(self, task: str, metric: str) -> frozenset[str]:
        """Ids of the questions that a metric was asked for."""
        return frozenset(s["id"] for s in self.samples[task] if metric in s.get("predictions", {metric: ""}))

    @cached_property
    def questions(self) -> dict[str, frozenset[str]]:
        """Ids of the questions of each task."""
        return {task: frozenset(sample["id"] for sample in samples) for task, samples in self.samples.items()}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        system: that published it; empty for a run.
        name: of the model.
        way: of scoring.
        cells: by task: value, and both ends of its interval where it is a run's.
    """

    system: str
    name: str
    way: str
    cells: Cells


@dataclass(frozen=True)
class Test:
    """Two runs on the same questions.

    Attributes:
        task, metric: of both.
        first, second: names.
        only_first, only_second: questions that one alone has right.
        p: of McNemar's exact test.
    """

    task: str
    metric: str
    first: str
    second: str
    only_first: int
    only_second: int
    p: float


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads results, and makes sure that a task asks the same questions in all of them.

    Raises:
        DataError: a folder holds no results or no samples, or question sets differ.
    """
    names = _names(folders)
    runs = [_read(name, folder) for name, folder in zip(names, folders, strict=True)]
    for first, second in combinations(runs, 2):
        for task in sorted(first.tasks.keys() & second.tasks.keys()):
            _check_same(task, first, second)
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, and as many in front of it as tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise DataError("a results folder is named twice: name each once.")
    depth = next(d for d in range(1, max(map(len, parts)) + 1) if len({p[-d:] for p in parts}) == len(parts))
    return ["/".join(p[-depth:]) for p in parts]


def _read(name: str, folder: Path) -> Run:
    try:
        content = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        tasks, _ = content["tasks"], content["settings"]["checkpoint"]
        for found in (one for table in tasks.values() for one in table.values()):
            float(found["value"]), list(map(float, found["interval"])), int(found["count"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder} holds no {RESULTS} of megatron-med evaluate ({error!r}): name its --output folder."
        ) from error
    if not tasks:
        raise DataError(f"{folder} holds no scores yet: let megatron-med evaluate end, then compare.")
    samples = {}
    for task in tasks:
        path = samples_file(folder, task)
        if not path.is_file():
            raise DataError(
                f"{folder} holds results of {task} and no {path.name}: questions and answers stand there. Copy the "
                "whole folder."
            )
        samples[task] = list(read_samples(path).values())
        if any("predictions" in sample and "prompt" not in sample for sample in samples[task]):
            raise DataError(f"{path} holds answers without their prompts: copy the whole folder of the evaluation.")
    return Run(name, folder, content, samples)


def _check_same(task: str, first: Run, second: Run) -> None:
    pairs = [(first.questions[task], second.questions[task])]
    for metric in first.tasks[task].keys() & second.tasks[task].keys():
        pairs.append((first.asked(task, metric), second.asked(task, metric)))
    a, b = next(((a, b) for a, b in pairs if a != b), pairs[0])
    if a != b:
        raise DataError(
            f"{task} has {len(a)} questions in {first.folder} and {len(b)} in {second.folder}, {len(a & b)} of them "
            "the same: they cannot be compared. Score both on one file, with the same --limit."
        )
    files = [run.content["settings"]["files"].get(task, [None])[0] for run in (first, second)]
    if files[0] != files[1]:
        raise DataError(
            f"{task} was read from different files in {first.folder} and {second.folder} (sha256 {files[0]} and "
            f"{files[1]}): score both on one file."
        )


def rows_of_runs(runs: Sequence[Run]) -> list[Row]:
    """A row for each run and metric."""
    rows = []
    for run in runs:
        metrics = dict.fromkeys(metric for table in run.tasks.values() for metric in table if ORDER not in metric)
        for metric in metrics:
            found = {task: table[metric] for task, table in run.tasks.items() if metric in table}
            cells = {task: (one["value"], one["interval"]) for task, one in found.items()}
            shots = run.content["settings"].get("shots")
            rows.append(Row("", run.name, f"{metric}, {shots} examples" if shots else metric, cells))
    return rows


def published_rows(tasks: Sequence[str]) -> list[Row]:
    """What was published on any of these tasks."""
    rows = []
    for entry in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")):
        for table in entry["tables"]:
            for name, values in table["rows"].items():
                pairs = zip(entry["tasks"], values, strict=True)
                cells: Cells = {task: (value, None) for task, value in pairs if task in tasks and value is not None}
                if cells:
                    rows.append(Row(f"{entry['system']} ({entry['source']})", name, table["way"], cells))
    return rows


def tests_between(runs: Sequence[Run]) -> list[Test]:
    """McNemar's test for every two runs that have a task and a metric in common, and two metrics of one run never."""
    tests = []
    for first, second in combinations(runs, 2):
        for task in first.tasks:
            for metric in first.tasks[task]:
                if ORDER in metric or metric not in second.tasks.get(task, {}):
                    continue
                pairs = _paired(judge(first.samples[task], metric), judge(second.samples[task], metric))
                if pairs:
                    found = mcnemar([a.right for a, _ in pairs], [b.right for _, b in pairs])
                    numbers = (found.only_first, found.only_second, found.p)
                    tests.append(Test(task, metric, first.name, second.name, *numbers))
    return tests


def _paired(first: Sequence[Judged], second: Sequence[Judged]) -> list[tuple[Judged, Judged]]:
    """Answers to the same question; with several draws of examples those of the first that both have, or else of the
    first of each, so that no question counts twice."""
    if not first or not second:
        return []
    common = [seed for seed in dict.fromkeys(one.seed for one in first) if seed in {one.seed for one in second}]
    seeds = (common[0], common[0]) if common else (first[0].seed, second[0].seed)
    others = {one.id: one for one in second if one.seed == seeds[1]}
    return [(one, others[one.id]) for one in first if one.seed == seeds[0] and one.id in others]
