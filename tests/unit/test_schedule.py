"""Schedules as data: complete, free of deadlock, with the known bubble and memory figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_med.parallel.schedule import (
    GENERATORS,
    Backward,
    Forward,
    ScheduleError,
    forward_only,
    gpipe,
    one_forward_one_backward,
    simulate,
)

shapes = given(stages=st.integers(1, 12), micro_batches=st.integers(1, 40))


@pytest.mark.parametrize("name", GENERATORS)
@shapes
def test_every_shape_runs_and_each_pass_is_there_once(name: str, stages: int, micro_batches: int) -> None:
    schedule = GENERATORS[name](stages, micro_batches)
    simulation = simulate(schedule)
    assert len(simulation.intervals) == 2 * stages * micro_batches
    for stage, actions in enumerate(schedule):
        assert sorted(a.micro_batch for a in actions if isinstance(a, Forward)) == list(range(micro_batches)), stage
        assert sorted(a.micro_batch for a in actions if isinstance(a, Backward)) == list(range(micro_batches)), stage


@pytest.mark.parametrize("name", GENERATORS)
@shapes
def test_bubble_share_is_the_published_one(name: str, stages: int, micro_batches: int) -> None:
    simulation = simulate(GENERATORS[name](stages, micro_batches), forward_time=1, backward_time=2)
    assert simulation.bubble_share == pytest.approx((stages - 1) / (micro_batches + stages - 1))


@shapes
def test_1f1b_keeps_only_as_many_activations_as_stages_behind(stages: int, micro_batches: int) -> None:
    simulation = simulate(one_forward_one_backward(stages, micro_batches))
    assert simulation.peak_activations == [min(stages - stage, micro_batches) for stage in range(stages)]
    assert simulate(gpipe(stages, micro_batches)).peak_activations == [micro_batches] * stages


def test_forward_only_has_no_backward() -> None:
    assert all(isinstance(action, Forward) for actions in forward_only(3, 5) for action in actions)
    assert simulate(forward_only(3, 5)).makespan == 7


def test_a_missing_pass_is_found() -> None:
    schedule = one_forward_one_backward(3, 4)
    schedule[1].pop()
    with pytest.raises(ScheduleError, match="stage 1"):
        simulate(schedule)


def test_a_doubled_pass_is_found() -> None:
    schedule = gpipe(2, 2)
    schedule[1][0] = schedule[1][1]
    with pytest.raises(ScheduleError, match="exactly once"):
        simulate(schedule)


def test_a_deadlock_is_found() -> None:
    schedule = gpipe(2, 2)
    schedule[0] = [Forward(0), Backward(0), Forward(1), Backward(1)]
    schedule[1] = [Forward(0), Forward(1), Backward(0), Backward(1)]
    with pytest.raises(ScheduleError, match="deadlock"):
        simulate(schedule)
