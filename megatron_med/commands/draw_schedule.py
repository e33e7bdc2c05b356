"""The timeline of a pipeline schedule: figures on the console and, when asked, a picture.

megatron-med draw-schedule NAME --stages P --micro-batches M [--chunks V] [--picture FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_med.commands.arguments import Parser
from megatron_med.errors import ConfigError
from megatron_med.parallel.pipeline_parallel.schedule import (
    GENERATORS,
    Action,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
)
from megatron_med.parallel.pipeline_parallel.simulation import Simulation, simulate

_COLOURS: dict[type, tuple[str, str]] = {
    Forward: ("forward", "#4c78c8"),
    Backward: ("backward", "#3f9b57"),
    BackwardInput: ("backward, input", "#7cc08c"),
    BackwardWeight: ("backward, weight", "#e3a33b"),
}
_MOST_LABELS = 1500


def main() -> None:
    parser = Parser(
        description="Runs a pipeline schedule on paper: bubble, peak of live activations, and a picture of it.",
    )
    parser.add_argument("schedule", choices=sorted(GENERATORS))
    parser.add_argument("--stages", type=int, default=4, help="pipeline stages (default: 4)")
    parser.add_argument("--micro-batches", type=int, default=8, help="micro-batches of one step (default: 8)")
    parser.add_argument("--chunks", type=int, help="chunks a stage (default: 2 for interleaved, else 1)")
    parser.add_argument("--forward-time", type=float, default=1.0, help="of a micro-batch through a stage (default: 1)")
    parser.add_argument("--backward-time", type=float, default=2.0, help="(default: 2)")
    parser.add_argument("--picture", type=Path, help="write the timeline to this .png, .svg or .pdf")
    arguments = parser.parse_args()
    _describe(arguments)


def _describe(arguments: argparse.Namespace) -> None:
    name, stages, micro_batches = arguments.schedule, arguments.stages, arguments.micro_batches
    default = 2 if name == "interleaved" else 1
    chunks = default if arguments.chunks is None else arguments.chunks
    if min(stages, micro_batches, chunks) < 1:
        raise ConfigError("--stages, --micro-batches and --chunks must be at least 1.")
    if chunks > 1 and name not in ("interleaved", "gpipe"):
        raise ConfigError(f"--chunks is {chunks}: {name} runs one chunk a stage. Leave it out, or take interleaved.")
    schedule = GENERATORS[name](stages, micro_batches, chunks)
    forward, backward = arguments.forward_time / chunks, arguments.backward_time / chunks
    simulation = simulate(schedule, forward, backward)
    pieces = "" if chunks == 1 else f" pieces of 1/{chunks} stage each"
    print(f"{name}: {stages} stages of {chunks} chunk{'' if chunks == 1 else 's'}, {micro_batches} micro-batches")
    print(f"time of one step:        {simulation.makespan:g}")
    print(f"bubble share:            {simulation.bubble_share:.2%}")
    print(f"peak live micro-batches: {simulation.peak_activations}{pieces}")
    if arguments.picture is not None:
        draw(simulation, f"{name}, bubble {simulation.bubble_share:.1%}", arguments.picture)
        print(f"wrote {arguments.picture}")


def draw(simulation: Simulation, title: str, target: Path) -> None:
    """Draws every action as a bar: stages from top to bottom, time from left to right, later chunks paler."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError("--picture needs matplotlib: pip install 'megatron_med[plot]'.") from error
    stages = len(simulation.peak_activations)
    figure, axes = pyplot.subplots(figsize=(min(40, max(9, simulation.makespan * 0.32)), 1.2 + 0.55 * stages))
    chunks = 1 + max(action.chunk for _, action, _, _ in simulation.intervals)
    with_labels = len(simulation.intervals) <= _MOST_LABELS
    for stage, action, start, end in simulation.intervals:
        _bar(axes, stage, action, start, end, chunks, with_labels)
    kinds = [kind for kind in _COLOURS if any(isinstance(action, kind) for _, action, _, _ in simulation.intervals)]
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=_COLOURS[kind][1]) for kind in kinds]
    axes.legend(handles, [_COLOURS[kind][0] for kind in kinds], loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.set(xlim=(0, simulation.makespan), ylim=(stages - 0.5, -0.5), xlabel="time", ylabel="stage", title=title)
    axes.set_yticks(range(stages))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    try:
        figure.savefig(target, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {target} cannot be written: {error}.") from error
    finally:
        pyplot.close(figure)


def _bar(axes: Any, stage: int, action: Action, start: float, end: float, chunks: int, label: bool) -> None:
    opacity = 1 - 0.55 * action.chunk / max(1, chunks - 1) if chunks > 1 else 1.0
    colour = _COLOURS[type(action)][1]
    axes.barh(stage, end - start, left=start, height=0.82, color=colour, alpha=opacity, edgecolor="white", linewidth=1)
    if label:
        axes.text((start + end) / 2, stage, str(action.micro_batch), ha="center", va="center", fontsize=7)


if __name__ == "__main__":
    main()
