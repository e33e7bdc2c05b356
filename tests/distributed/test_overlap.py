"""A trace of two steps: each collective is issued before the computation it hides behind, and awaited after."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_med.config.schema import Config, OverlapConfig
from megatron_med.parallel import buckets
from megatron_med.parallel.collectives import Pending
from megatron_med.train.step import train_step
from megatron_med.train.timers import StepTimer
from tests.ranks import run_ranks
from tests.training import MODELS, make_config, set_up

LAYERS, MICRO_BATCHES, STEPS = 4, 4, 2
PRODUCTS = ("aten.mm.", "aten.addmm")

Event = tuple[str, str, int, int]
"""(issue, wait or product; operation; dimensions of the result; its address)"""


class _Trace(TorchDispatchMode):
    """Every collective, every message and every matrix product, in the order they are issued."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith("c10d."):
            result = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
            self.events.append(("issue", name, result.dim(), result.data_ptr()))
        elif name.startswith(PRODUCTS):
            self.events.append(("product", name, 0, 0))
        return function(*args, **(kwargs or {}))


def _traced(config: Config) -> list[Event]:
    buckets.BUCKET_ELEMENTS = 10_000  # several buckets of a small model
    trace, wait = _Trace(), Pending.wait

    def logged_wait(pending: Pending) -> torch.Tensor:
        if pending._work is not None:
            trace.events.append(("wait", "", pending._result.dim(), pending._result.data_ptr()))
        return wait(pending)

    Pending.wait = logged_wait  # type: ignore[method-assign]
    machinery, loader = set_up(config)
    with trace:
        for step in range(STEPS):
            train_step(machinery, loader.load(8 * step, 8, step), 1e-3, False, StepTimer(torch.device("cpu")))
    return trace.events


def _trace(prefix: Path, overlap: bool, ranks: int, **parallel: Any) -> list[list[Event]]:
    config = make_config(
        prefix,
        MODELS["llama"] | {"num_layers": LAYERS},
        micro_batch=8 // MICRO_BATCHES,
        overlap=OverlapConfig(overlap, overlap, overlap, overlap),
        **parallel,
    )
    return run_ranks(ranks, _traced, config)


def _hidden(events: list[Event], operation: str, dimensions: int, product: str = "aten.") -> tuple[int, int]:
    """Collectives of a kind: how many have a product between issue and wait, and how many there are."""
    hidden = found = 0
    for place, (kind, name, dim, address) in enumerate(events):
        if kind != "issue" or not name.startswith(f"c10d.{operation}") or dim != dimensions:
            continue
        rest = events[place + 1 :]
        end = next((i for i, event in enumerate(rest) if event[0] == "wait" and event[3] == address), None)
        if end is None:
            continue
        found += 1
        hidden += any(kind == "product" and name.startswith(product) for kind, name, _, _ in rest[:end])
    return hidden, found


SEQUENCE = 3  # [seq, batch, hidden]
BUCKET = 1


@pytest.fixture(scope="module")
def tensor_parallel(sample_data: Path) -> Callable[[bool], list[Event]]:
    return lambda overlap: _trace(sample_data, overlap, 2, tensor=2)[0]


def test_sequence_collectives_hide_behind_the_products_of_the_backward_pass(
    tensor_parallel: Callable[[bool], list[Event]],
) -> None:
    columns = STEPS * MICRO_BATCHES * (2 * LAYERS + 1)  # qkv and gate_up of each layer, and the head
    events = tensor_parallel(True)
    assert _hidden(events, "_allgather_base_", SEQUENCE, "aten.mm")[0] == columns, "beside the input gradient"
    assert _hidden(events, "_reduce_scatter_base_", SEQUENCE, "aten.addmm_")[0] == columns, "beside the weight gradient"
    events = tensor_parallel(False)
    assert _hidden(events, "_allgather_base_", SEQUENCE)[0] == 0
    assert _hidden(events, "_reduce_scatter_base_", SEQUENCE)[0] == 0


def test_weight_gradients_are_summed_in_the_product(tensor_parallel: Callable[[bool], list[Event]]) -> None:
    products = STEPS * MICRO_BATCHES * (4 * LAYERS + 1)
    names = [name for kind, name, _, _ in tensor_parallel(True) if kind == "product"]
    assert sum(name.startswith("aten.addmm_") for name in names) == products


def test_buckets_hide_behind_the_last_backward_and_the_next_forward_pass(sample_data: Path) -> None:
    events = _trace(sample_data, True, 2)[0]
    reduced, count = _hidden(events, "_reduce_scatter_base_", BUCKET)
    assert count >= STEPS * 4
    assert reduced == count - 2 * STEPS, "all but the first layer's and the embedding's: no product comes after them"
    gathered, count = _hidden(events, "_allgather_base_", BUCKET)
    assert count >= 4
    assert gathered == count - 2, "all but the same two: no product comes before them"
    events = _trace(sample_data, False, 2)[0]
    assert _hidden(events, "_reduce_scatter_base_", BUCKET)[0] == 0
    assert _hidden(events, "_allgather_base_", BUCKET)[0] == 0


@pytest.mark.parametrize(("ranks", "parallel"), [(2, {"sharding": "none"}), (4, {"replicate": 2})], ids=str)
def test_replicas_sum_under_the_last_backward_pass(sample_data: Path, ranks: int, parallel: dict[str, Any]) -> None:
    """Whole buckets, or the slices that a group of ranks has cut; the last buckets have nothing left to hide behind."""
    for overlap in (True, False):
        events = _trace(sample_data, overlap, ranks, **parallel)[0]
        hidden, count = _hidden(events, "allreduce_", BUCKET)
        assert count >= STEPS * 8
        assert (hidden >= STEPS * 4) if overlap else (hidden == 0), (hidden, count)


def test_reductions_begin_in_the_last_backward_pass_only(sample_data: Path) -> None:
    events = _trace(sample_data, True, 2)[0]
    first = next(i for i, (_, name, dim, _) in enumerate(events) if "reduce_scatter" in name and dim == BUCKET)
    weight_products = sum(name.startswith("aten.addmm_") for _, name, _, _ in events[:first])
    assert weight_products > (MICRO_BATCHES // 2 - 1) * (4 * LAYERS + 1), "not before the last micro-batch"


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble", "interleaved"])
def test_messages_between_stages_travel_beside_computation(sample_data: Path, schedule: str) -> None:
    virtual = 2 if schedule == "interleaved" else 1
    for overlap in (True, False):
        for events in _trace(sample_data, overlap, 2, pipeline=2, schedule=schedule, virtual_stages=virtual):
            hidden, count = _hidden(events, "recv_", SEQUENCE)
            assert count >= STEPS * MICRO_BATCHES
            assert (hidden > count // 3) if overlap else (hidden == 0), (hidden, count)
            everything = [dim for _, name, dim, _ in events if name.startswith("c10d.send")]
            assert everything == [SEQUENCE] * (STEPS * MICRO_BATCHES * (3 if virtual == 2 else 1)), "hidden states only"
            behind, sends = _hidden(events, "send", SEQUENCE)
            assert behind >= sends // 2, "a stage goes on computing while it sends"


def _outputs_alive(config: Config) -> int:
    """Outputs of this rank's chunk that are in memory when its first backward pass begins."""
    machinery, loader = set_up(config)
    outputs: list[weakref.ref[Any]] = []
    alive: list[int] = []
    for chunk in machinery.chunks:
        chunk.register_forward_hook(lambda _module, _inputs, output: outputs.append(weakref.ref(output)))
    before = machinery.engine._before_backward

    def count(chunk: int, is_last: bool) -> None:
        time.sleep(0.2)  # the receiver takes its messages meanwhile
        alive.append(sum(output() is not None for output in outputs))
        assert before is not None
        before(chunk, is_last)

    machinery.engine._before_backward = count
    train_step(machinery, loader.load(0, 8, 1), 1e-3, False, StepTimer(torch.device("cpu")))
    return alive[0]


def test_a_stage_keeps_no_output_that_it_has_sent(sample_data: Path) -> None:
    config = make_config(sample_data, MODELS["llama"], pipeline=2, schedule="gpipe")
    first, _ = run_ranks(2, _outputs_alive, config)
    assert first <= 2, "eight micro-batches went through; only those on their way may be in memory"
