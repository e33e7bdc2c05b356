"""A comparison as Markdown and as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_med.evaluate import pictures
from megatron_med.evaluate.compare import Row, Run, Test, published_rows, rows_of_runs, tests_between
from megatron_med.files import naming, write_json, write_text

MARKDOWN, PICTURE, NUMBERS = "comparison.md", "comparison.png", "comparison.json"


def write_comparison(runs: Sequence[Run], output: Path) -> str:
    """Writes all three files.

    Args:
        runs: what is compared.
        output: the folder, which is there.

    Returns:
        The Markdown.
    """
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    ours, published = rows_of_runs(runs), published_rows(tasks)
    tests = tests_between(runs)
    text = _markdown(runs, tasks, ours, published, tests)
    with naming(output):
        write_text(output / MARKDOWN, text)
        rows = [dataclasses.asdict(row) for row in (*ours, *published)]
        write_json(output / NUMBERS, {"rows": rows, "tests": [dataclasses.asdict(test) for test in tests]})
        pictures.comparison(tasks, ours, published).savefig(output / PICTURE, dpi=120)
    return text


def _markdown(
    runs: Sequence[Run], tasks: Sequence[str], ours: Sequence[Row], published: Sequence[Row], tests: Sequence[Test]
) -> str:
    counts = {task: len(run.questions[task]) for run in runs for task in run.tasks}
    lines = ["# Comparison", ""]
    lines += [f"- {run.name}: `{run.content['settings']['checkpoint']}`" for run in runs]
    lines += ["", *_table(["model", "way", *(f"{task} ({counts[task]})" for task in tasks)], _cells(ours, tasks)), ""]
    lines += ["Values with their 95 % bootstrap interval; behind a task, its questions.", ""]
    if published:
        lines += ["## Published", "", "By their authors, with their own prompts and files.", ""]
        for system in dict.fromkeys(row.system for row in published):
            mine = [row for row in published if row.system == system]
            columns = [task for task in tasks if any(task in row.cells for row in mine)]
            lines += [f"**{system}**", "", *_table(["model", "way", *columns], _cells(mine, columns)), ""]
    if tests:
        lines += ["## McNemar's test", "", "Questions that only one of two runs has right, and the exact p;"]
        lines += ["of several draws of examples the first.", ""]
        rows = (
            [test.task, test.metric, test.first, test.second, test.only_first, test.only_second, f"{test.p:.4g}"]
            for test in tests
        )
        lines += [*_table(["task", "way", "first", "second", "only first", "only second", "p"], rows), ""]
    return "\n".join(lines)


def _cells(rows: Iterable[Row], tasks: Sequence[str]) -> Iterable[list[object]]:
    for row in rows:
        yield [row.name, row.way, *(_cell(row, task) for task in tasks)]


def _cell(row: Row, task: str) -> str:
    if task not in row.cells:
        return ""
    value, interval = row.cells[task]
    return f"{value:.4g}" if interval is None else f"{value:.4f} ({interval[0]:.4f} to {interval[1]:.4f})"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
