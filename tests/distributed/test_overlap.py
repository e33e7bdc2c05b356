"""A trace of two steps: each collective is issued before the computation that hides it, and awaited after."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_med.config.schema import Config, OverlapConfig
from megatron_med.parallel.data_parallel import buckets
from megatron_med.tracing.recorder import Recorder, group_labels
from megatron_med.tracing.trace import Collective, Event, Kernel, Wait
from tests.ranks import run_ranks
from tests.training import MODELS, make_config, one_step, set_up

LAYERS, MICRO_BATCHES, STEPS = 4, 4, 2
INPUT_GRADIENT, WEIGHT_GRADIENT = "mm", "addmm_"
LINEAR = (INPUT_GRADIENT, WEIGHT_GRADIENT, "addmm")
PIPELINE = ("pp", "pp_backward", "pp_wrap", "pp_wrap_backward")


def _recorded(config: Config) -> list[Event]:
    """Two steps of this rank."""
    buckets.BUCKET_ELEMENTS = 10_000  # several buckets of a small model
    train_module, loader = set_up(config)
    with Recorder(group_labels(train_module.context)) as recorder:
        for step in range(1, STEPS + 1):
            one_step(train_module, loader, step)
    return recorder.trace.events


def _trace(prefix: Path, overlap: bool, ranks: int, **parallel: Any) -> list[list[Event]]:
    config = make_config(
        prefix,
        MODELS["llama"] | {"num_layers": LAYERS},
        micro_batch=8 // MICRO_BATCHES,
        overlap=OverlapConfig(overlap, overlap, overlap, overlap),
        **parallel,
    )
    return run_ranks(ranks, _recorded, config)


def _products(events: list[Event], *names: str) -> int:
    """Products of linear layers, all of them or those of these names."""
    return sum(isinstance(event, Kernel) and event.name in (names or LINEAR) for event in events)


def _hidden(events: list[Event], operation: str, group: str, *products: str) -> tuple[int, int]:
    """Collectives of tensors: how many have a product between issue and wait, and how many there are."""
    hidden = found = 0
    for place, event in enumerate(events):
        if not isinstance(event, Collective) or event.operation != operation or event.size <= SCALAR:
            continue
        if event.group not in (PIPELINE if group == "pp" else (group,)):
            continue
        waits = (end for end, other in enumerate(events) if isinstance(other, Wait) and other.number == event.number)
        end = next(waits, None)
        if end is None:
            continue
        found += 1
        hidden += _products(events[place:end], *products) > 0
    return hidden, found


SCALAR = 8
"""Bytes of a count or a loss: what is larger is a tensor."""
SEQUENCE, HIDDEN, FP32_BYTES = 32, 32, 4
HIDDEN_STATES = SEQUENCE * (8 // MICRO_BATCHES) * HIDDEN * FP32_BYTES
"""Bytes of ``[seq, batch, hidden]``."""


@pytest.fixture(scope="module")
def tensor_parallel(sample_data: Path) -> Callable[[bool], list[Event]]:
    return lambda overlap: _trace(sample_data, overlap, 2, tensor=2)[0]


def test_sequence_collectives_hide_behind_the_products_of_the_backward_pass(
    tensor_parallel: Callable[[bool], list[Event]],
) -> None:
    columns = STEPS * MICRO_BATCHES * 2 * LAYERS  # qkv and gate_up of each layer; the head's are in its forward pass
    events = tensor_parallel(True)
    assert _hidden(events, "all_gather", "tp", INPUT_GRADIENT)[0] == columns, "during the input gradient"
    assert _hidden(events, "reduce_scatter", "tp", WEIGHT_GRADIENT)[0] == columns, "during the weight gradient"
    events = tensor_parallel(False)
    assert _hidden(events, "all_gather", "tp")[0] == 0
    assert _hidden(events, "reduce_scatter", "tp")[0] == 0


def test_weight_gradients_are_summed_in_the_product(tensor_parallel: Callable[[bool], list[Event]]) -> None:
    products = STEPS * MICRO_BATCHES * (4 * LAYERS + 1)
    assert _products(tensor_parallel(True), WEIGHT_GRADIENT) == products


def test_buckets_hide_behind_the_last_backward_and_the_next_forward_pass(sample_data: Path) -> None:
    events = _trace(sample_data, True, 2)[0]
    reduced, count = _hidden(events, "reduce_scatter", "dp_shard")
    assert count >= STEPS * 4
    assert reduced == count - 2 * STEPS, "all but the first layer's and the embedding's: no product comes after them"
    gathered, count = _hidden(events, "all_gather", "dp_shard")
    assert count >= 4
    assert gathered == count - 2, "all but the same two: no product comes before them"
    events = _trace(sample_data, False, 2)[0]
    assert _hidden(events, "reduce_scatter", "dp_shard")[0] == 0
    assert _hidden(events, "all_gather", "dp_shard")[0] == 0


@pytest.mark.parametrize(
    ("ranks", "group", "parallel"),
    [(2, "dp_shard", {"sharding": "none"}), (4, "dp_replicate", {"replicate": 2})],
    ids=["whole buckets", "slices"],
)
def test_replicas_sum_under_the_last_backward_pass(
    sample_data: Path, ranks: int, group: str, parallel: dict[str, Any]
) -> None:
    """Whole buckets, or the slices that a group of ranks has cut; the last buckets have nothing left to hide behind."""
    for overlap in (True, False):
        events = _trace(sample_data, overlap, ranks, **parallel)[0]
        hidden, count = _hidden(events, "all_reduce", group)
        assert count >= STEPS * 8
        assert (hidden >= STEPS * 4) if overlap else (hidden == 0), (hidden, count)


def test_reductions_begin_in_the_last_backward_pass_only(sample_data: Path) -> None:
    events = _trace(sample_data, True, 2)[0]
    first = next(i for i, e in enumerate(events) if isinstance(e, Collective) and e.operation == "reduce_scatter")
    assert _products(events[:first], WEIGHT_GRADIENT) > (MICRO_BATCHES // 2 - 1) * (4 * LAYERS + 1), (
        "not before the last micro-batch"
    )


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble", "interleaved"])
def test_messages_between_stages_travel_beside_computation(sample_data: Path, schedule: str) -> None:
    virtual = 2 if schedule == "interleaved" else 1
    for overlap in (True, False):
        for events in _trace(sample_data, overlap, 2, pipeline=2, schedule=schedule, virtual_stages=virtual):
            hidden, count = _hidden(events, "receive", "pp")
            assert count >= STEPS * MICRO_BATCHES
            assert (hidden > count // 3) if overlap else (hidden == 0), (hidden, count)
            everything = [e.size for e in events if isinstance(e, Collective) and e.operation == "send"]
            assert everything == [HIDDEN_STATES] * (STEPS * MICRO_BATCHES * (3 if virtual == 2 else 1)), (
                "hidden states only"
            )
            behind, sends = _hidden(events, "send", "pp")
            assert behind >= sends // 2, "a stage goes on computing while it sends"


def _outputs_alive(config: Config) -> int:
    """Outputs of this rank's chunk that are in memory when its first backward pass begins."""
    train_module, loader = set_up(config)
    outputs: list[weakref.ref[Any]] = []
    alive: list[int] = []
    for chunk in train_module.chunks:
        chunk.register_forward_hook(lambda _module, _inputs, output: outputs.append(weakref.ref(output)))
    before = train_module.engine._before_backward

    def count(chunk: int, is_last: bool) -> None:
        time.sleep(0.2)  # the receiver takes its messages meanwhile
        alive.append(sum(output() is not None for output in outputs))
        assert before is not None
        before(chunk, is_last)

    train_module.engine._before_backward = count
    one_step(train_module, loader, 1)
    return alive[0]


def test_a_stage_keeps_no_output_that_it_has_sent(sample_data: Path) -> None:
    config = make_config(sample_data, MODELS["llama"], pipeline=2, schedule="gpipe")
    first, _ = run_ranks(2, _outputs_alive, config)
    assert first <= 2, "eight micro-batches went through; only those on their way may be in memory"
