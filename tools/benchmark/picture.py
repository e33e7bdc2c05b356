"""The training step as a picture: tokens per second of every contestant, and the machine's limit.

    python tools/benchmark/picture.py benchmarks/FILE.json --output docs/images/step.svg

The limit is a step that is nothing but matrix products at the rate that the machine reaches with 2,048^3.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from report import Report, read

from megatron_med.errors import ConfigError, run_command

matplotlib.use("svg")
from matplotlib import pyplot

OURS, THEIRS, LIMIT = "#1f6f8b", "#b9c4cc", "#7a3b3b"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="that throughput.py or all.sh has written")
    parser.add_argument("--output", type=Path, required=True, help="an SVG file")
    arguments = parser.parse_args()
    machine, reports = read(arguments.file)
    steps = [report for report in reports if report.name.startswith("step ")]
    if not steps:
        raise ConfigError(f"{arguments.file} holds no training step: run tools/benchmark/throughput.py --json first.")
    figure, panels = pyplot.subplots(1, len(steps), figsize=(5.5 * len(steps) + 1.5, 3.2), squeeze=False)
    for panel, report in zip(panels[0], steps, strict=True):
        _draw(panel, report)
    told = f"{machine['processor']}, {machine['capability']}, torch {machine['torch']}"
    figure.text(0.99, 0.01, told, ha="right", va="bottom", fontsize=8)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "step"
    figure.savefig(arguments.output, metadata={"Date": None})


def _draw(panel: pyplot.Axes, report: Report) -> None:
    """A bar for each contestant, with its share of the limit, and a line for the limit."""
    rows = [row for row in report.rows if "tokens/s" in row]
    limit = rows[0]["tokens/s"] / rows[0]["share of products"]
    names = [row["contestant"] for row in rows]
    rates = [row["tokens/s"] for row in rows]
    bars = panel.barh(names, rates, color=[OURS if name == "megatron_med" else THEIRS for name in names])
    told = [f"{row['tokens/s']:,.0f}, {row['share of products']:.0%}" for row in rows]
    labels = panel.bar_label(bars, told, label_type="edge", padding=-78, fontsize=8)
    labels[names.index("megatron_med")].set_color("white")
    panel.axvline(limit, color=LIMIT, linestyle="--", linewidth=1)
    middle = (len(rows) - 1) / 2
    panel.text(limit, middle, "nothing but products", rotation=90, ha="right", va="center", fontsize=8, color=LIMIT)
    panel.invert_yaxis()
    panel.set_xlabel("tokens/s, share of the limit")
    settings = report.settings
    title = f"{settings['preset']}, {settings['precision']}, {settings['batch']}, {settings['threads']} threads"
    panel.set_title(title, fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    run_command(main)
