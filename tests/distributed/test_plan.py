"""The planner against whole steps that are really run: on gloo ranks with data, and on ranks of a world that is not
there. Memory is the tensors' own count, traffic the collectives that were issued."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_med.config.schema import Config
from megatron_med.plan.cluster import KINDS, Cluster
from megatron_med.plan.predict import Plan, plan
from megatron_med.tracing.trace import Trace
from tests.ranks import run_ranks
from tests.training import GPT2, LLAMA, make_config, memory_batch, recorded_steps

WIDE = {
    "num_layers": 8,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
LLAMA_WIDE = LLAMA | WIDE | {"num_query_groups": 4, "ffn_hidden_size": 704}
GPT2_WIDE = GPT2 | WIDE
"""Large enough that tensors, not their fixed costs, fill the memory."""

RUNS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one rank": (1, LLAMA_WIDE, {}),
    "tensor 2 x pipeline 2": (4, LLAMA_WIDE, {"tensor": 2, "pipeline": 2}),
    "tensor 2 without sequence parallelism": (2, GPT2_WIDE, {"tensor": 2, "sequence_parallel": False}),
    "pipeline 4, tied": (4, GPT2_WIDE | {"num_layers": 20}, {"pipeline": 4}),
    "interleaved": (2, LLAMA_WIDE, {"pipeline": 2, "virtual_stages": 2, "schedule": "interleaved"}),
    "zero bubble": (4, LLAMA_WIDE, {"pipeline": 4, "schedule": "zero_bubble"}),
    "gpipe": (2, LLAMA_WIDE, {"pipeline": 2, "schedule": "gpipe"}),
    "optimizer sharded": (4, LLAMA_WIDE, {"tensor": 2}),
    "replicas": (4, LLAMA_WIDE, {"replicate": 2}),
    "nothing sharded": (2, GPT2_WIDE, {"sharding": "none"}),
    "fully sharded": (4, LLAMA_WIDE, {"sharding": "full"}),
    "fully sharded, replicas": (4, GPT2_WIDE, {"sharding": "full", "replicate": 2}),
    "fully sharded in a pipeline": (4, LLAMA_WIDE, {"sharding": "full", "pipeline": 2}),
    "recomputed": (2, LLAMA_WIDE, {"tensor": 2, "recompute": "full"}),
    "every other layer recomputed": (2, GPT2_WIDE, {"pipeline": 2, "recompute": "full", "recompute_interval": 2}),
}


def _config(prefix: Path, name: str, precision: str) -> Config:
    _, model, options = RUNS[name]
    options = dict(options)
    whole = {key: options.pop(key) for key in ("recompute", "recompute_interval") if key in options}
    config = make_config(prefix, model, precision=precision, batch=memory_batch(options), micro_batch=2, **options)
    data = dataclasses.replace(config.data, sequence_length=128)
    return dataclasses.replace(config, data=data, **whole)


def _real_steps(config: Config) -> tuple[int, dict[str, tuple[int, int]]]:
    """Peak bytes of two steps, and calls and bytes of each group in the second one."""
    recorder, trace = recorded_steps(config)
    return recorder.peak, _traffic(trace)


def _traffic(trace: Trace) -> dict[str, tuple[int, int]]:
    """Group -> (calls, bytes); of a pipeline what is sent, tied gradients apart."""
    calls: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for event in trace.collectives:
        group = event.group
        if event.operation == "receive":
            continue
        if group.startswith("pp"):
            group = "pp" if event.operation == "send" else "embedding"
        calls[group] += 1
        sizes[group] += event.size
    return {group: (calls[group], sizes[group]) for group in calls}


def _plan(config: Config, ranks: int) -> Plan:
    return plan(config, Cluster(KINDS["a100-80g"], 1, ranks), device="cpu")


WITH_FP32 = ("one rank", "optimizer sharded", "fully sharded")
"""Where masters are the weights themselves, or slices of them."""


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "bf16") for name in RUNS), *((name, "fp32") for name in WITH_FP32)]
)
def test_memory_and_traffic_of_a_real_run_are_the_planned_ones(name: str, precision: str, sample_data: Path) -> None:
    ranks = RUNS[name][0]
    config = _config(sample_data, name, precision)
    planned = _plan(config, ranks)
    for rank, (peak, traffic) in enumerate(run_ranks(ranks, _real_steps, config)):
        stage = planned.stages[rank * len(planned.stages) // ranks]
        wanted = {group: (value.calls, int(value.size)) for group, value in stage.traffic.items()}
        assert traffic == wanted, f"rank {rank}"
        assert stage.memory.total == pytest.approx(peak, rel=0.05), f"rank {rank}"
