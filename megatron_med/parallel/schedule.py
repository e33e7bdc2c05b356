"""Pipeline schedules as plain data: for every stage, the list of passes it runs in order.

Generators make such lists, ``simulate`` proves that a list can run and prices it, the engine of ``pipeline.py``
executes it. No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Forward:
    """The forward pass of one micro-batch through one chunk of the stage's layers."""

    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class Backward:
    """The backward pass of one micro-batch through one chunk of the stage's layers."""

    micro_batch: int
    chunk: int = 0


Action = Forward | Backward
Schedule = list[list[Action]]
"""Stage -> actions in order."""


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All forward passes, then all backward passes (Huang et al. 2019)."""
    forwards: list[Action] = [Forward(index) for index in range(micro_batches)]
    backwards: list[Action] = [Backward(index) for index in range(micro_batches)]
    return [forwards + backwards for _ in range(stages)]


def one_forward_one_backward(stages: int, micro_batches: int) -> Schedule:
    """1F1B (Narayanan et al. 2021): warm-up forwards, then pairs, then cool-down backwards.

    Stage s keeps at most ``stages - s`` micro-batches alive.
    """
    schedule: Schedule = []
    for stage in range(stages):
        warmup = min(stages - stage - 1, micro_batches)
        actions: list[Action] = [Forward(index) for index in range(warmup)]
        for index in range(micro_batches - warmup):
            actions += [Forward(warmup + index), Backward(index)]
        actions += [Backward(index) for index in range(micro_batches - warmup, micro_batches)]
        schedule.append(actions)
    return schedule


def forward_only(stages: int, micro_batches: int) -> Schedule:
    """Validation: no backward pass."""
    return [[Forward(index) for index in range(micro_batches)] for _ in range(stages)]


GENERATORS: dict[str, Callable[[int, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}
"""Schedules by the name that ``parallel.schedule`` takes."""


class ScheduleError(AssertionError):
    """A schedule that cannot run: only a bug in a generator makes one."""


@dataclass(frozen=True)
class Simulation:
    """What a schedule costs.

    Attributes:
        makespan: time from the first action to the end of the last.
        bubble_share: idle time of all stages as a share of stages x makespan.
        peak_activations: micro-batches alive at once, per stage.
        intervals: ``(stage, action, start, end)`` of every action.
    """

    makespan: float
    bubble_share: float
    peak_activations: list[int]
    intervals: list[tuple[int, Action, float, float]]


def simulate(schedule: Schedule, forward_time: float = 1.0, backward_time: float = 2.0) -> Simulation:
    """Runs a schedule on paper; transfers take no time.

    Raises:
        ScheduleError: an action is missing or doubled, or the stages wait for each other for ever.
    """
    _check_complete(schedule)
    ends: dict[tuple[int, Action], float] = {}
    intervals: list[tuple[int, Action, float, float]] = []
    position = [0] * len(schedule)
    clock = [0.0] * len(schedule)
    remaining = sum(map(len, schedule))
    while remaining:
        progressed = False
        for stage, actions in enumerate(schedule):
            while position[stage] < len(actions):
                action = actions[position[stage]]
                needed = _dependencies(action, stage, len(schedule))
                if any(need not in ends for need in needed):
                    break
                start = max([clock[stage], *(ends[need] for need in needed)])
                end = start + (forward_time if isinstance(action, Forward) else backward_time)
                ends[stage, action] = clock[stage] = end
                intervals.append((stage, action, start, end))
                position[stage] += 1
                remaining -= 1
                progressed = True
        if not progressed:
            stuck = {
                stage: actions[position[stage]]
                for stage, actions in enumerate(schedule)
                if position[stage] < len(actions)
            }
            raise ScheduleError(f"deadlock: {stuck}")
    makespan = max(clock)
    busy = sum(end - start for _, _, start, end in intervals)
    return Simulation(
        makespan=makespan,
        bubble_share=1 - busy / (makespan * len(schedule)),
        peak_activations=[_peak(actions) for actions in schedule],
        intervals=intervals,
    )


def _check_complete(schedule: Schedule) -> None:
    expected = Counter(schedule[0])
    for stage, actions in enumerate(schedule):
        count = Counter(actions)
        if count != expected or max(count.values(), default=1) > 1:
            raise ScheduleError(f"stage {stage} does not run each action of stage 0 exactly once")
    backwards = {action for action in expected if isinstance(action, Backward)}
    forwards = {Backward(action.micro_batch, action.chunk) for action in expected if isinstance(action, Forward)}
    if backwards and backwards != forwards:
        raise ScheduleError("a forward pass has no backward pass, or the other way round")


def _dependencies(action: Action, stage: int, stages: int) -> list[tuple[int, Action]]:
    if isinstance(action, Forward):
        return [(stage - 1, action)] if stage > 0 else []
    needs: list[tuple[int, Action]] = [(stage, Forward(action.micro_batch, action.chunk))]
    if stage < stages - 1:
        needs.append((stage + 1, action))
    return needs


def _peak(actions: list[Action]) -> int:
    alive = peak = 0
    for action in actions:
        alive += 1 if isinstance(action, Forward) else -1
        peak = max(peak, alive)
    return peak
