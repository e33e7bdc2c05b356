"""The planner against closed formulas and exact counts. Whole steps are in tests/distributed/test_plan.py."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import sys
from typing import Any

import pytest
import torch

from megatron_med.config import load_config
from megatron_med.config.presets import PRESETS
from megatron_med.config.schema import (
    Config,
    DataConfig,
    DataSource,
    ModelConfig,
    OverlapConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron_med.errors import ConfigError
from megatron_med.model.batch import plain_batch
from megatron_med.model.build import build_stage
from megatron_med.parallel.context import single_process_context
from megatron_med.parallel.pipeline_parallel.schedule import GENERATORS, Forward
from megatron_med.parallel.pipeline_parallel.simulation import simulate
from megatron_med.plan.cluster import KINDS, SOURCES, Cluster, parse_cluster
from megatron_med.plan.cost_model import KernelAssumptions
from megatron_med.plan.predict import plan
from megatron_med.plan.report import as_json, as_text, search_as_text
from megatron_med.plan.search import search
from megatron_med.tracing.recorder import Recorder
from tests.conftest import REPOSITORY

CLUSTER = parse_cluster("a100-80g:16x8")


def make_config(
    model: dict[str, Any], *, length: int = 4096, micro: int = 2, batch: int = 512, **others: Any
) -> Config:
    """A run on no data in particular; what is no section of its own goes to ``parallel``."""
    whole = {name: others.pop(name) for name in ("recompute", "recompute_interval", "precision") if name in others}
    return Config(
        model=ModelConfig(**model),
        data=DataConfig(sequence_length=length, train=[DataSource("x")]),
        train=TrainConfig(steps=10, micro_batch_size=micro, global_batch_size=batch, output_dir="RUN"),
        parallel=ParallelConfig(**others),
        **whole,
    )


def meditron(**others: Any) -> Config:
    return make_config(PRESETS["llama2-70b"], **({"tensor": 8, "pipeline": 8} | others))


def test_the_parameters_of_llama2_70b_are_exact() -> None:
    result = plan(meditron(), CLUSTER)
    assert result.parameters == 68_976_648_192
    # its norms are whole on every tensor-parallel rank; everything else is cut in eight
    norms = 161 * 8192
    assert sum(stage.parameters for stage in result.stages) == (68_976_648_192 - norms) // 8 + norms


def test_tensor_traffic_is_the_closed_formula() -> None:
    """Korthikanti et al. 2022: each layer gathers and scatters s x b x h twice forward; backward twice more, and two
    gathers again for the weight gradients."""
    result = plan(meditron(layers_per_stage=[10] * 8), CLUSTER)
    message = 4096 * 2 * 8192 * 2
    middle = result.stages[3].traffic["tp"]
    norm_gradients = 20 * 8192 // 2 * 4  # summed over TP once a step, slices over DP 2
    assert middle.calls == 128 * 10 * 10 + 1
    assert middle.size == 128 * 10 * 10 * message + norm_gradients
    first = result.stages[0].traffic["tp"]
    assert first.size == middle.size + 128 * 2 * message  # the embedding's reduce-scatter and its gather back
    last = result.stages[7].traffic["tp"]
    vectors = 3 * 4096 * 2 * 4  # maximum, target logit and sum of the cross entropy in fp32
    final_norm = 8192 // 2 * 4
    assert last.size == middle.size + 128 * (2 * message + vectors) + final_norm  # the head gathers once and scatters


def test_tensor_traffic_without_sequence_parallelism() -> None:
    """Shoeybi et al. 2019: two all-reduces forward, two backward. A layer that runs again stops before its last one,
    whose result nobody needs."""
    result = plan(meditron(layers_per_stage=[10] * 8, sequence_parallel=False), CLUSTER)
    message = 4096 * 2 * 8192 * 2
    assert result.stages[3].traffic["tp"].size == 128 * 10 * 4 * message
    recomputed = plan(meditron(layers_per_stage=[10] * 8, sequence_parallel=False, recompute="full"), CLUSTER)
    assert recomputed.stages[3].traffic["tp"].size == 128 * 10 * 5 * message


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("gpipe", 2)])
def test_pipeline_traffic_is_one_message_a_border_and_direction(schedule: str, chunks: int) -> None:
    result = plan(meditron(schedule=schedule, virtual_stages=chunks), CLUSTER)
    message = 4096 // 8 * 2 * 8192 * 2
    sent = sum(stage.traffic["pp"].size for stage in result.stages)
    assert sent == 128 * 2 * (8 * chunks - 1) * message


def test_data_parallel_traffic_is_the_closed_formula() -> None:
    """fp32 gradients out, bf16 weights in; hybrid sharding sums slices over replicas; FSDP gathers for each pass."""
    model = PRESETS["llama2-7b"]
    seven_billion = 6_738_415_616
    result = plan(make_config(model, length=2048, batch=256), CLUSTER)
    assert result.stages[0].traffic["dp_shard"].size == 6 * seven_billion + 8  # the count of tokens
    result = plan(make_config(model, length=2048, batch=256, replicate=16), CLUSTER)
    assert result.stages[0].traffic["dp_replicate"].size == 4 * seven_billion // 8
    result = plan(make_config(model, length=2048, batch=256, sharding="none"), CLUSTER)
    assert result.stages[0].traffic["dp_shard"].size == 4 * seven_billion + 8
    result = plan(make_config(model, length=2048, batch=512, sharding="full"), CLUSTER)
    ends = 2 * 32000 * 4096 + 4096  # embedding, head and norm stay whole from forward to backward
    micro_batches = 2
    wanted = micro_batches * (2 * (2 * (seven_billion - ends) + ends) + 4 * seven_billion)
    assert result.stages[0].traffic["dp_shard"].size == wanted + 8


def test_mfu_has_three_figures_that_are_what_their_papers_count() -> None:
    result = plan(meditron(recompute="full"), CLUSTER)
    tokens, peak = result.tokens_per_second, 128 * 312e12
    assert result.mfu == pytest.approx(6 * 68_976_648_192 * tokens / peak)
    layer = 2 * 8192 * (8192 + 1024) + 3 * 8192 * 28672
    attention = 80 * 8192 * 4096 / 2
    assert result.mfu_with_attention == pytest.approx(
        (6 * (80 * layer + 32000 * 8192) + 12 * attention) * tokens / peak
    )
    gpt = make_config(
        {
            "family": "gpt2",
            "num_layers": 80,
            "hidden_size": 12288,
            "num_attention_heads": 96,
            "vocab_size": 51200,
            "max_position_embeddings": 2048,
        },
        length=2048,
        batch=2304,
        tensor=8,
        pipeline=8,
        recompute="full",
    )
    result = plan(gpt, parse_cluster("a100-80g:192x8"))
    batch, length, layers, hidden, vocabulary = 2304, 2048, 80, 12288, 51200
    sc21 = 96 * batch * length * layers * hidden**2 * (1 + length / (6 * hidden) + vocabulary / (16 * layers * hidden))
    assert result.hardware_flops == pytest.approx(sc21 / result.step_seconds / 1536)


def test_predicted_seconds_follow_their_causes() -> None:
    """Each thing that costs time in reality costs time here, and nothing else does."""
    base = plan(meditron(), CLUSTER)
    assert plan(meditron(), CLUSTER, KernelAssumptions("fused")).step_seconds < base.step_seconds
    assert plan(meditron(), CLUSTER, KernelAssumptions("separate", "flash1")).step_seconds > base.step_seconds
    assert plan(meditron(), CLUSTER, KernelAssumptions("separate", "scores")).step_seconds > base.step_seconds
    assert plan(meditron(), parse_cluster("a100-80g:16x8", 1)).step_seconds > base.step_seconds
    assert plan(meditron(recompute="full"), CLUSTER).step_seconds > 1.2 * base.step_seconds
    for name in ("gradient_reduce", "weight_gather", "tensor", "pipeline"):
        off = dataclasses.replace(OverlapConfig(), **{name: False})
        assert plan(meditron(overlap=off), parse_cluster("a100-80g:16x8", 1)).step_seconds > base.step_seconds, name
    assert plan(meditron(), parse_cluster("h100-80g:16x8")).step_seconds < 0.6 * base.step_seconds


def test_fewer_bubbles_with_interleaving_and_zero_bubble() -> None:
    small = {"batch": 64}
    plain = plan(meditron(**small), CLUSTER)
    assert plain.bubble == pytest.approx(7 / (16 + 7), abs=0.03)
    assert plan(meditron(schedule="interleaved", virtual_stages=2, **small), CLUSTER).bubble < 0.7 * plain.bubble
    assert plan(meditron(schedule="zero_bubble", **small), CLUSTER).bubble < 0.8 * plain.bubble


def test_recomputation_trades_memory_for_time() -> None:
    kept, again = plan(meditron(), CLUSTER), plan(meditron(recompute="full"), CLUSTER)
    half = plan(meditron(recompute="full", recompute_interval=2), CLUSTER)
    activations = [result.stages[0].memory.activations for result in (again, half, kept)]
    assert activations == sorted(activations)
    assert activations[0] < 0.2 * activations[2]


def test_selective_recomputation_costs_nothing_beside_a_fused_attention_kernel() -> None:
    assert plan(meditron(recompute="selective"), CLUSTER) == dataclasses.replace(
        plan(meditron(), CLUSTER), config=meditron(recompute="selective")
    )


def test_the_prices_of_products_fall_with_their_size_and_never_pass_their_share() -> None:
    for kind in KINDS.values():
        shares = [kind.product_efficiency(size, size) for size in (128, 512, 1024, 4096, 8192, 16384)]
        assert shares == sorted(shares)
        assert shares[-1] <= kind.product_share
        assert shares[-1] > 0.95 * kind.product_share
    a100 = KINDS["a100-80g"]
    one_wave, one_tile_more = a100.product_efficiency(128 * 12, 256 * 9), a100.product_efficiency(128 * 109, 256)
    assert one_wave == pytest.approx(a100.product_share)  # 108 tiles on 108 multiprocessors
    assert one_tile_more < 0.75 * a100.product_share  # a second wave for a single one


def test_groups_share_the_cards_of_their_node() -> None:
    cluster = parse_cluster("a100-80g:16x8", 1)
    inside, _ = cluster.bandwidth(tuple(range(8)))
    assert inside == 300e9 * 0.78
    one_a_node, _ = cluster.bandwidth((0, 8))
    assert one_a_node == pytest.approx(25e9 * 0.92 / 8)
    whole_nodes, _ = cluster.bandwidth(tuple(range(16)))
    assert whole_nodes == pytest.approx(25e9 * 0.92)


def test_transfers_lengthen_a_pipeline_by_the_way_there_and_back() -> None:
    schedule = GENERATORS["gpipe"](4, 8, 1)
    plain, sent = simulate(schedule), simulate(schedule, transfers=[0.1] * 4)
    assert sent.makespan == pytest.approx(plain.makespan + 2 * 3 * 0.1)
    late = simulate(schedule, transfers=[0.1] * 4, waits="receiver")
    assert late.makespan == pytest.approx(plain.makespan + 2 * (3 + 7) * 0.1)  # and once for each further micro-batch
    blocking = simulate(schedule, transfers=[0.1] * 4, waits="sender")
    assert blocking.makespan > sent.makespan
    slow_last = simulate(
        schedule, durations=lambda stage, action: (1 + (stage == 3)) * (1 + (type(action) is not Forward))
    )
    assert slow_last.makespan > 8 * 6


def test_every_assumption_is_printed_with_its_source() -> None:
    result = plan(meditron(), CLUSTER)
    text = as_text(result)
    for name, source in SOURCES.items():
        assert f"{name} = " in text
        assert source in text
    fields = {field.name for field in dataclasses.fields(KINDS["h200"])} - {"name"}
    assert fields == set(SOURCES), "a figure without a source"


def test_the_json_has_what_a_program_needs() -> None:
    result = json.loads(json.dumps(as_json(plan(meditron(), CLUSTER))))
    assert result["parameters"] == 68_976_648_192
    assert {"tokens_per_second", "mfu", "mfu_with_attention", "hardware_share", "fits", "bubble"} <= result.keys()
    assert result["step_seconds"] == pytest.approx(512 * 4096 / result["tokens_per_second"])
    stage = result["stages"][0]
    parts = [value for name, value in stage["memory"].items() if name != "total"]
    assert stage["memory"]["total"] == pytest.approx(sum(parts))
    assert stage["traffic"]["tp"]["calls"] > 0


def test_the_published_runs_stand_in_the_docs_as_they_are_predicted() -> None:
    """Within 15 %, or named on the page as further off."""
    specification = importlib.util.spec_from_file_location(
        "published", REPOSITORY / "tools/benchmark/published_runs.py"
    )
    assert specification is not None
    assert specification.loader is not None
    published = importlib.util.module_from_spec(specification)
    sys.modules["published"] = published
    specification.loader.exec_module(published)
    page = (REPOSITORY / "docs" / "planner.md").read_text()
    rows = [published.compare(run) for run in published.RUNS]
    for line in published.as_table(rows).splitlines():
        assert line in page
    for row in rows:
        off = round(100 * row["difference"])
        assert abs(off) <= 15 or f"**{row['run']} is {off} % off**" in page


@pytest.mark.parametrize("nics", [1, 8])
def test_the_better_cut_in_the_recipe_is_better_by_what_its_page_says(nics: int) -> None:
    folder = REPOSITORY / "examples" / "gap_replay"
    page = (folder / "README.md").read_text()
    options = page.split("sbatch examples/gap_replay/70b.sbatch --")[1].split("```")[0].replace("\\", " ").split()
    cluster = parse_cluster("a100-80g:16x8", nics)
    published = plan(load_config([str(folder / "70b.yaml")], 128), cluster)
    better = plan(load_config([str(folder / "70b.yaml"), "--" + options[0], *options[1:]], 128), cluster)
    assert better.fits
    gain = round(100 * (better.tokens_per_second / published.tokens_per_second - 1))
    if nics == 1:
        assert f"{published.tokens_per_second:,.0f}" in page
        assert f"{better.tokens_per_second:,.0f}" in page
        assert f"It is {gain} % faster by prediction" in page
    else:
        assert f"it gains {gain} %" in page


def test_the_recorder_counts_memory_as_the_allocator_does() -> None:
    """torch.profiler sees every allocation and release of the CPU's allocator."""
    _train_a_little()  # whatever is allocated once per process
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        _train_a_little()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    recorder = Recorder()
    with recorder:
        _train_a_little()
    assert recorder.peak == max(itertools.accumulate(sizes))
    assert recorder.live == sum(sizes) == 0


def _train_a_little() -> None:
    """Two forward and backward passes of a Llama with 1M parameters."""
    config = ModelConfig(**PRESETS["llama-tiny"])
    model = build_stage(config, single_process_context(), torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.zeros(4, 128, dtype=torch.int64)
    batch = plain_batch(tokens)
    for _ in range(2):
        model.loss(model(None, batch), batch).backward()


def test_what_does_not_fit_is_marked() -> None:
    result = plan(meditron(tensor=8, pipeline=2, micro=8, batch=1024), CLUSTER)
    assert not result.fits
    assert "does not fit" in as_text(result)
    assert "too much" in as_text(result)


def test_the_search_ranks_what_fits_and_says_why_the_rest_does_not() -> None:
    model = PRESETS["llama2-7b"]
    cluster = parse_cluster("a100-40g:1x4")
    config = make_config(model, length=2048, micro=1, batch=8)
    result = search(config, cluster)
    assert result.best, "nothing fits"
    assert all(found.fits for found in result.best)
    seconds = [found.step_seconds for found in result.best]
    assert seconds == sorted(seconds)
    for found in result.best:  # each is what the planner says of the same configuration by itself
        assert plan(found.config, cluster).step_seconds == pytest.approx(found.step_seconds)
    sizes = {(size.tensor, size.pipeline): size for size in result.sizes}
    assert set(sizes) == {(t, p) for t in (1, 2, 4) for p in (1, 2, 4) if t * p <= 4}
    bad = [size for size in result.sizes if size.tokens_per_second is None]
    assert bad, "7B with its optimizer on 4 x 40 GB cannot fit everywhere"
    assert all("GiB" in size.reason for size in bad)
    text = search_as_text(result, cluster)
    assert "does not fit" in text
    assert f"{result.best[0].tokens_per_second:,.0f}" in text


@pytest.mark.parametrize(
    ("text", "word"), [("a100:16x8", "unknown"), ("a100-80g", "NODESxGPUS"), ("a100-80g:0x8", "NODESxGPUS")]
)
def test_bad_clusters_are_refused(text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse_cluster(text)
    with pytest.raises(ConfigError, match="--nics is 0"):
        parse_cluster("h200:1x8", 0)


def test_clusters_by_name() -> None:
    cluster = parse_cluster("h200:2x8", 4)
    assert isinstance(cluster, Cluster)
    assert (cluster.world_size, cluster.accelerator.nics, cluster.name) == (16, 4, "h200:2x8")
