"""Schedules as data: complete, free of deadlock, with the known bubble and memory figures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_med.parallel.pipeline_parallel.schedule import (
    GENERATORS,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    forward_only,
    gpipe,
    interleaved,
    one_forward_one_backward,
    zero_bubble,
)
from megatron_med.parallel.pipeline_parallel.simulation import ScheduleError, simulate
from tests.conftest import REPOSITORY

STAGES, MICRO_BATCHES, CHUNKS = st.integers(1, 12), st.integers(1, 40), st.integers(1, 5)


def shapes(test: Callable[..., None]) -> Callable[..., None]:
    """Three hundred shapes of a pipeline."""
    return settings(max_examples=300)(given(stages=STAGES, micro_batches=MICRO_BATCHES, chunks=CHUNKS)(test))


@pytest.mark.parametrize("name", GENERATORS)
@shapes
def test_every_shape_runs_and_each_pass_is_there_once(name: str, stages: int, micro_batches: int, chunks: int) -> None:
    chunks = 1 if name in ("1f1b", "zero_bubble") else chunks
    schedule = GENERATORS[name](stages, micro_batches, chunks)
    simulate(schedule)  # no deadlock, and every message is asked for in the order it is sent
    everything = {(index, chunk) for index in range(micro_batches) for chunk in range(chunks)}
    kinds = (Forward, BackwardInput, BackwardWeight) if name == "zero_bubble" else (Forward, Backward)
    for actions in schedule:
        assert len(actions) == len(kinds) * len(everything)
        for kind in kinds:
            assert {(a.micro_batch, a.chunk) for a in actions if isinstance(a, kind)} == everything


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@shapes
def test_bubble_share_of_one_chunk(name: str, stages: int, micro_batches: int, chunks: int) -> None:
    simulation = simulate(GENERATORS[name](stages, micro_batches, 1), forward_time=1, backward_time=2)
    assert simulation.bubble_share == pytest.approx((stages - 1) / (micro_batches + stages - 1))


@shapes
def test_interleaving_divides_the_bubble_by_the_chunks(stages: int, micro_batches: int, chunks: int) -> None:
    groups = -(-micro_batches // stages)
    simulation = simulate(interleaved(stages, groups * stages, chunks))
    assert simulation.bubble_share == pytest.approx((stages - 1) / (chunks * groups * stages + stages - 1))
    warmup = 2 * (stages - 1) + (chunks - 1) * stages
    assert max(simulation.peak_activations) == min(warmup + 1, chunks * groups * stages)


@shapes
def test_zero_bubble_idles_less_than_1f1b_at_equal_peak_memory(stages: int, micro_batches: int, chunks: int) -> None:
    plain = simulate(one_forward_one_backward(stages, micro_batches))
    split = simulate(zero_bubble(stages, micro_batches))
    assert max(split.peak_activations) == max(plain.peak_activations)
    if stages > 1:
        assert split.bubble_share < plain.bubble_share
    if micro_batches >= stages:  # (p - 1) (forward + input - weight), Qi et al. 2023, table 2
        assert split.makespan == pytest.approx(3 * micro_batches + stages - 1)


@shapes
def test_1f1b_keeps_only_as_many_activations_as_stages_behind(stages: int, micro_batches: int, chunks: int) -> None:
    simulation = simulate(one_forward_one_backward(stages, micro_batches))
    assert simulation.peak_activations == [min(stages - stage, micro_batches) for stage in range(stages)]
    assert simulate(gpipe(stages, micro_batches)).peak_activations == [micro_batches] * stages


def test_forward_only_has_no_backward() -> None:
    assert all(isinstance(action, Forward) for actions in forward_only(3, 5) for action in actions)
    assert simulate(forward_only(3, 5)).makespan == 7
    simulate(forward_only(3, 5, 2))


def test_a_missing_pass_is_found() -> None:
    schedule = one_forward_one_backward(3, 4)
    schedule[1].pop()
    with pytest.raises(ScheduleError, match="stage 1"):
        simulate(schedule)
    schedule = zero_bubble(2, 3)
    for actions in schedule:
        actions.remove(BackwardWeight(1))
    with pytest.raises(ScheduleError, match="two parts"):
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


def test_messages_asked_for_in_another_order_are_found() -> None:
    schedule = gpipe(2, 2)
    schedule[1] = [Forward(1), Forward(0), Backward(0), Backward(1)]
    with pytest.raises(ScheduleError, match="stage 1 asks stage 0"):
        simulate(schedule)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_command_prints_figures_and_draws_a_picture(name: str, tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    command = [sys.executable, "tools/draw_schedule.py", name, "--picture", str(picture)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True)
    assert "bubble share" in done.stdout
    assert not done.stderr
    assert picture.read_bytes()[1:4] == b"PNG"
    assert len(picture.read_bytes()) > 10_000


def test_the_command_refuses_chunks_that_a_schedule_does_not_have() -> None:
    command = [sys.executable, "tools/draw_schedule.py", "1f1b", "--chunks", "2"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "error: --chunks is 2: 1f1b runs one chunk a stage" in done.stderr
