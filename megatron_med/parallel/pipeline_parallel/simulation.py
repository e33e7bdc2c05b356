"""Runs a pipeline schedule on paper: proves that it cannot deadlock, and predicts its time. No torch here."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_med.parallel.pipeline_parallel.schedule import (
    Action,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Schedule,
)

Place = tuple[int, Action]
"""(stage, action)"""

Interval = tuple[int, Action, float, float]
"""(stage, action, start, end)"""

Waits = Literal["none", "receiver", "sender"]

Durations = Callable[[int, Action], float]
"""(stage, action) -> its time"""


class ScheduleError(AssertionError):
    """A schedule that cannot run: only a bug in a generator makes one."""


@dataclass(frozen=True)
class Simulation:
    """What a schedule costs.

    Attributes:
        makespan: time from the first action to the end of the last.
        bubble_share: idle time of all stages as a share of stages x makespan.
        peak_activations: micro-batches alive at once, per stage; with several chunks a micro-batch in one chunk
            counts as one piece.
        intervals: of every action.
    """

    makespan: float
    bubble_share: float
    peak_activations: list[int]
    intervals: list[Interval]


def uniform(forward_time: float, backward_time: float) -> Durations:
    """Every chunk takes as long. The input and the weight part of a split backward pass take half each."""
    times = {
        Forward: forward_time,
        Backward: backward_time,
        BackwardInput: backward_time / 2,
        BackwardWeight: backward_time / 2,
    }
    return lambda _stage, action: times[type(action)]


def simulate(
    schedule: Schedule,
    forward_time: float = 1.0,
    backward_time: float = 2.0,
    *,
    durations: Durations | None = None,
    transfers: Sequence[float] | None = None,
    waits: Waits = "none",
) -> Simulation:
    """Runs a schedule on paper.

    Args:
        schedule: any.
        forward_time, backward_time: of one micro-batch through one chunk.
        durations: time of each action instead.
        transfers: time of a message between each stage and the next, the last one's to the first; None: none.
        waits: who stands still while a message travels: none, it is asked for ahead of time; receiver, it is asked
            for when it is needed; sender, too, a blocking send.

    Raises:
        ScheduleError: an action is missing or doubled, the stages wait for each other for ever, or a stage receives
            micro-batches in another order than its neighbour sends them.
    """
    _check_complete(schedule)
    chunks = 1 + max((action.chunk for action in schedule[0]), default=0)
    durations = durations or uniform(forward_time, backward_time)
    transfers = transfers or [0.0] * len(schedule)
    arrivals: dict[Place, float] = {}
    ends: dict[Place, float] = {}
    intervals: list[Interval] = []
    position = [0] * len(schedule)
    clock = [0.0] * len(schedule)
    remaining = sum(map(len, schedule))
    # Each round runs every stage as far as it gets; one in which no stage gets anywhere is a deadlock.
    while remaining:
        progressed = False
        for stage, actions in enumerate(schedule):
            while position[stage] < len(actions):
                action = actions[position[stage]]
                needed = dependencies(action, stage, len(schedule), chunks)
                # A stage runs its list in order: what cannot run yet stops it, whatever comes after.
                if any(need not in ends for need in needed):
                    break
                start = max([clock[stage], *(ends[need] for need in needed)])
                # A receiver that asks only now waits for the whole journey, else for what is left of it.
                travels = [arrivals[need] - ends[need] for need in needed if need[0] != stage]
                if waits == "receiver" and travels:
                    start += max(travels)
                start = max([start, *(arrivals[need] for need in needed if need[0] != stage)])
                end = start + durations(stage, action)
                ends[stage, action] = end
                arrivals[stage, action] = end + _transfer(stage, action, transfers, chunks)
                # A blocking send holds its stage until the message has arrived.
                clock[stage] = arrivals[stage, action] if waits == "sender" else end
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
    # Messages between two stages are matched by their order alone, so it must be the same at both ends.
    _check_transfers(schedule, chunks)
    makespan = max(end for _, _, _, end in intervals)
    busy = sum(end - start for _, _, start, end in intervals)
    return Simulation(
        makespan=makespan,
        bubble_share=1 - busy / (makespan * len(schedule)),
        peak_activations=[_peak(actions) for actions in schedule],
        intervals=intervals,
    )


def dependencies(action: Action, stage: int, stages: int, chunks: int) -> list[Place]:
    """What must have ended, anywhere, before an action of ``stage`` can begin."""
    index, chunk = action.micro_batch, action.chunk
    if isinstance(action, Forward):
        if stage > 0:
            return [(stage - 1, action)]
        # The first stage's further chunks go on where the last stage's chunk before ended.
        return [(stages - 1, Forward(index, chunk - 1))] if chunk > 0 else []
    if isinstance(action, BackwardWeight):
        return [(stage, BackwardInput(index, chunk))]
    needs: list[Place] = [(stage, Forward(index, chunk))]
    # Gradients go the same way back; the very last chunk begins with its own loss.
    if stage < stages - 1:
        needs.append((stage + 1, action))
    elif chunk < chunks - 1:
        needs.append((0, type(action)(index, chunk + 1)))
    return needs


def _transfer(stage: int, action: Action, transfers: Sequence[float], chunks: int) -> float:
    """Time of the message that an action sends; 0 where it sends none."""
    stages = len(transfers)
    if isinstance(action, Forward):
        is_end = stage == stages - 1 and action.chunk == chunks - 1
        return 0.0 if is_end else transfers[stage]
    if isinstance(action, BackwardWeight) or (stage == 0 and action.chunk == 0):
        return 0.0
    return transfers[stage - 1]


def _check_complete(schedule: Schedule) -> None:
    expected = Counter(schedule[0])
    for stage, actions in enumerate(schedule):
        count = Counter(actions)
        if count != expected or max(count.values(), default=1) > 1:
            raise ScheduleError(f"stage {stage} does not run each action of stage 0 exactly once")
    passes: dict[type, set[tuple[int, int]]] = defaultdict(set)
    for action in expected:
        passes[type(action)].add((action.micro_batch, action.chunk))
    trains = len(passes) > 1
    whole = passes[Backward] | passes[BackwardInput]
    if trains and (whole != passes[Forward] or passes[Backward] & passes[BackwardInput]):
        raise ScheduleError("a forward pass has no backward pass, or the other way round")
    if passes[BackwardInput] != passes[BackwardWeight]:
        raise ScheduleError("the two parts of a backward pass are not both there")


def _check_transfers(schedule: Schedule, chunks: int) -> None:
    """Messages of one direction between two stages are asked for in the order they are sent."""
    asked: dict[tuple[int, int, bool], list[Action]] = defaultdict(list)
    for stage, actions in enumerate(schedule):
        for action in actions:
            for source, needed in dependencies(action, stage, len(schedule), chunks):
                if source != stage:
                    asked[source, stage, isinstance(action, Forward)].append(needed)
    for (source, stage, _), order in asked.items():
        wanted = set(order)
        if [action for action in schedule[source] if action in wanted] != order:
            raise ScheduleError(f"stage {stage} asks stage {source} for its messages in another order than sent")


def _peak(actions: list[Action]) -> int:
    return max((alive for _, alive in alive_during(actions, lambda _chunk: 1)), default=0)


def alive_during(
    actions: Sequence[Action], kept: Callable[[int], int], kept_for_weights: Callable[[int], int] | None = None
) -> Iterator[tuple[Action, int]]:
    """Each action of a stage with what is alive while it runs, in units of ``kept(chunk)``.

    A micro-batch is alive from its forward pass to the end of its backward pass, weight part included.

    Args:
        actions: of one stage.
        kept: what a micro-batch keeps in a chunk.
        kept_for_weights: what it keeps after the input part of its backward pass; None: all of it.
    """
    kept_for_weights = kept_for_weights or kept
    alive = 0
    for action in actions:
        chunk = action.chunk
        if isinstance(action, Forward):
            alive += kept(chunk)
        yield action, alive
        if isinstance(action, Backward):
            alive -= kept(chunk)
        elif isinstance(action, BackwardInput):
            alive -= kept(chunk) - kept_for_weights(chunk)
        elif isinstance(action, BackwardWeight):
            alive -= kept_for_weights(chunk)


def messages_waiting(schedule: Schedule, simulation: Simulation, ahead: int = 1) -> list[dict[Action, int]]:
    """Stage -> action -> messages that the stage has sent and still keeps while the action runs.

    A message is taken when the receiver asks for it, ``ahead`` actions before the one that needs it, and its sender
    lets go of it when it sends the next one.
    """
    chunks = 1 + max(action.chunk for action in schedule[0])
    # When each message is asked for: ahead of the action that needs it.
    starts = {(stage, action): start for stage, action, start, _ in simulation.intervals}
    ends = {(stage, action): end for stage, action, _, end in simulation.intervals}
    asked: dict[Place, float] = {}
    for stage, actions in enumerate(schedule):
        for index, action in enumerate(actions):
            asks_at = starts[stage, actions[max(0, index - ahead)]]
            asked |= {need: asks_at for need in dependencies(action, stage, len(schedule), chunks) if need[0] != stage}
    waiting = []
    for stage, actions in enumerate(schedule):
        # A send is let go of at the first own send after the receiver has asked for it: the engine looks only then.
        sent = sorted((ends[stage, action], asked[stage, action]) for action in actions if (stage, action) in asked)
        own_sends = [time for time, _ in sent]
        gone = sorted(_next_after(own_sends, max(time, taken)) for time, taken in sent)
        waiting.append(
            {
                # Sent before the action ends, less what was gone before it began.
                action: bisect_left(own_sends, ends[stage, action]) - bisect_right(gone, starts[stage, action])
                for action in actions
            }
        )
    return waiting


def _next_after(times: list[float], moment: float) -> float:
    """The first of sorted ``times`` after ``moment``; infinity where there is none."""
    place = bisect_right(times, moment)
    return times[place] if place < len(times) else float("inf")
