"""Pictures of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_med.evaluate.compare import Row
from megatron_med.page import COLOURS

# isort: split
from matplotlib.figure import Figure

_MARKS = ("o", "s", "^", "D", "v", "P", "X")


def accuracies(values: Sequence[tuple[str, float, float, float]]) -> Figure:
    """A line a result: name, value, and both ends of its interval."""
    picture = Figure(figsize=(9, 1 + 0.32 * len(values)), layout="constrained")
    axes = picture.subplots()
    names = [name for name, *_ in values]
    points = [value for _, value, _, _ in values]
    # a bootstrap interval may leave out a value at its very end
    reach = [[max(0, v - low) for _, v, low, _ in values], [max(0, high - v) for _, v, _, high in values]]
    axes.errorbar(points, range(len(values)), xerr=reach, fmt="o", color=COLOURS[0], capsize=3)
    axes.set_yticks(range(len(values)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy")
    axes.grid(axis="x", color="#eee")
    return picture


def reliability(bins_of: Mapping[str, Sequence[Sequence[Any]]]) -> Figure:
    """Accuracy over confidence; the size of a point tells how many answers it stands for."""
    picture = Figure(figsize=(6, 5), layout="constrained")
    axes = picture.subplots()
    axes.plot([0, 1], [0, 1], color="#bbb", linewidth=1)
    for (metric, bins), colour, mark in _styled(bins_of):
        total = sum(count for *_, count in bins)
        x, y = [one[0] for one in bins], [one[1] for one in bins]
        axes.plot(x, y, color=colour, linewidth=1)
        axes.scatter(x, y, s=[10 + 200 * count / total for *_, count in bins], color=colour, marker=mark, label=metric)
    axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="accuracy")
    axes.legend(frameon=False, markerscale=0.7)
    return picture


def risk_coverage(curves: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Share of wrong answers among those given, over the share of questions answered."""
    picture = Figure(figsize=(6, 4), layout="constrained")
    axes = picture.subplots()
    for (metric, curve), colour, _ in _styled(curves):
        axes.step([x for x, _ in curve], [y for _, y in curve], where="pre", color=colour, label=metric)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="share of the questions answered", ylabel="wrong among them")
    axes.legend(frameon=False)
    return picture


def _styled(items: Mapping[str, Any]) -> list[tuple[tuple[str, Any], str, str]]:
    repeated = len(items)
    return list(zip(items.items(), COLOURS * repeated, _MARKS * repeated, strict=False))


def comparison(tasks: Sequence[str], ours: Sequence[Row], published: Sequence[Row]) -> Figure:
    """A field for each task: runs with their intervals on top, what was published below."""
    rows = {task: [row for row in (*ours, *published) if task in row.cells] for task in tasks}
    picture = Figure(figsize=(9, 0.6 + sum(0.9 + 0.26 * len(found) for found in rows.values())), layout="constrained")
    ratios = [max(2, len(found)) + 2 for found in rows.values()]
    fields = picture.subplots(len(tasks), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axes, (task, found) in zip(fields, rows.items(), strict=True):
        for place, row in enumerate(found):
            value, ends = row.cells[task]
            reach = [[0], [0]] if ends is None else [[max(0, value - ends[0])], [max(0, ends[1] - value)]]
            colour = COLOURS[5] if ends is None else COLOURS[0]
            axes.errorbar([value], [place], xerr=reach, fmt="o", color=colour, capsize=3)
        axes.set_yticks(range(len(found)), [f"{row.name}: {row.way.partition(' (')[0]}" for row in found], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(task, fontsize=10, loc="left")
        axes.grid(axis="x", color="#eee")
        if "perplexity" not in task:
            axes.set_xlim(0, 1)
    return picture
