"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_med.plan.cluster import GIB, KINDS, SOURCES, Cluster
from megatron_med.plan.predict import Plan, StagePlan
from megatron_med.plan.search import PLANS_OF_A_SIZE, SearchResult

MODEL_ASSUMPTIONS = (
    "a kernel takes what its arithmetic or its memory traffic takes, whichever is longer, and the host is never late",
    "collectives are rings; all groups of a kind communicate at once and share the network cards of their node",
    "a computation during a collective has the multiprocessors that the collective leaves",
    "documents that are kept apart cost attention over all pairs of tokens, at the same share of the peak",
    "groups of different kinds do not slow each other down on the network cards",
    "products take 128 x 256 output tiles, or halves at 0.9 and eighths at 0.6 of their speed, whatever the inner size",
    "a backward pass of attention is 2.5 times the forward pass; all scores in memory cost 4 and 5 passes over them",
    "an AdamW step moves 44 bytes and a rounded weight an owned element, 4 to 16 bytes an element of the model",
    "no rank is slower than another; no time goes into data, checkpoints, validation and restarts",
)


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything a program may want to know. Bytes, seconds and shares, no percentages."""
    parallel = dataclasses.asdict(plan.config.parallel)
    return {
        "cluster": plan.cluster.name,
        "world_size": plan.cluster.world_size,
        "parallel": parallel | {"data": plan.config.parallel.data_size(plan.cluster.world_size)},
        "micro_batches": plan.micro_batches,
        "parameters": plan.parameters,
        "fits": plan.fits,
        "memory_limit": plan.cluster.usable_memory,
        "stages": [_stage_json(stage) for stage in plan.stages],
        "bubble": plan.bubble,
        "step_seconds": plan.step_seconds,
        "pipeline_seconds": plan.pipeline_seconds,
        "data_parallel_seconds": plan.data_parallel_seconds,
        "optimizer_seconds": plan.optimizer_seconds,
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "mfu_with_attention": plan.mfu_with_attention,
        "hardware_share": plan.hardware_share,
        "hardware_flops": plan.hardware_flops,
        "assumptions": assumptions(plan),
    }


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    memory = dataclasses.asdict(stage.memory) | {"total": stage.memory.total}
    traffic = {group: {"calls": value.calls, "bytes": value.size} for group, value in stage.traffic.items()}
    return {
        "ranks": list(stage.ranks),
        "layers": stage.layers,
        "parameters": stage.parameters,
        "memory": memory,
        "traffic": traffic,
        "forward_seconds": stage.forward_seconds,
        "backward_seconds": stage.backward_seconds,
        "tensor_parallel_seconds": stage.tensor_seconds,
    }


def assumptions(plan: Plan) -> list[dict[str, Any]]:
    """Every figure that the prediction takes as given: name, value, source."""
    kind = plan.cluster.accelerator
    figures = [
        {"name": field.name, "value": getattr(kind, field.name), "source": SOURCES[field.name]}
        for field in dataclasses.fields(kind)
        if field.name in SOURCES
    ]
    sizes = (512, 1024, 2048, 4096, 8192)
    table = {f"{size} x {size}": round(kind.product_efficiency(size, size), 3) for size in sizes}
    figures.append({"name": "product_efficiency", "value": table, "source": "product_share x wave quantisation"})
    figures.append({"name": "elementwise", "value": plan.kernels.elementwise, "source": "--elementwise"})
    figures.append({"name": "attention", "value": plan.kernels.attention, "source": "--attention"})
    return figures


def as_text(plan: Plan, verbose: bool = True) -> str:
    """The plan for a reader; ``verbose`` adds the assumptions."""
    lines = [*_head(plan), "", *_memory(plan), "", *_step(plan), "", *_traffic(plan)]
    if verbose:
        lines += ["", *_assumption_lines(plan)]
    return "\n".join(lines)


def cut_in_words(plan: Plan) -> str:
    """Tensor x pipeline x data, schedule, sharding, recomputation, batches."""
    config, parallel = plan.config, plan.config.parallel
    data = parallel.data_size(plan.cluster.world_size)
    schedule: str = parallel.schedule if parallel.pipeline > 1 else "no pipeline"
    if parallel.virtual_stages > 1:
        schedule += f" x {parallel.virtual_stages}"
    sharding: str = parallel.sharding if data > 1 else "none"
    if parallel.replicate > 1:
        sharding += f" in {parallel.replicate} replicas"
    return (
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {data}, {schedule}, sharding {sharding}, "
        f"recompute {config.recompute}, micro-batch {config.train.micro_batch_size}"
    )


def _head(plan: Plan) -> list[str]:
    config = plan.config
    return [
        f"{config.model.preset or config.model.family} on {plan.cluster.name} ({plan.cluster.world_size} GPUs, "
        f"network cards of a node: {plan.cluster.accelerator.nics})",
        f"  {plan.parameters:,} parameters, sequence {config.data.sequence_length}, {config.precision}, "
        f"global batch {config.train.global_batch_size}",
        f"  {cut_in_words(plan)}, {plan.micro_batches} micro-batches",
    ]


def _memory(plan: Plan) -> list[str]:
    limit = plan.cluster.usable_memory
    rows = [
        "memory of one rank, GiB",
        f"  {'stage':>5} {'ranks':>9} {'layers':>6} {'parameters':>14} {'weights':>8} {'gradients':>9} "
        f"{'optimizer':>9} {'activations':>11} {'temporary':>9} {'total':>7}",
    ]
    for number, stage in enumerate(plan.stages):
        memory = stage.memory
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.temporary, memory.total)
        widths = (8, 9, 9, 11, 9, 7)
        values = " ".join(f"{part / GIB:>{width}.2f}" for part, width in zip(parts, widths, strict=True))
        ranks = f"{stage.ranks[0]}-{stage.ranks[1]}"
        mark = "" if memory.total <= limit else "  too much"
        rows.append(f"  {number:>5} {ranks:>9} {len(stage.layers):>6} {stage.parameters:>14,} {values}{mark}")
    largest = max(stage.memory.total for stage in plan.stages)
    flash = "" if plan.kernels.attention != "scores" else " (counted as with a fused kernel, without the scores)"
    rows.append(f"  {verdict(largest, plan.cluster)}{flash}")
    return rows


def verdict(largest: float, cluster: Cluster) -> str:
    """Whether that many bytes fit, in words."""
    limit = cluster.usable_memory
    word = "fits" if largest <= limit else "does not fit"
    return f"{word}: {largest / GIB:.1f} of {limit / GIB:.1f} GiB"


def _step(plan: Plan) -> list[str]:
    stage = max(plan.stages, key=lambda stage: stage.forward_seconds + stage.backward_seconds)
    both = stage.forward_seconds + stage.backward_seconds
    return [
        "one step",
        f"  {plan.step_seconds:.2f} s = {plan.pipeline_seconds:.2f} passes + {plan.data_parallel_seconds:.2f} exposed "
        f"data-parallel communication + {plan.optimizer_seconds:.2f} optimizer",
        f"  a micro-batch through the slowest stage: {1e3 * stage.forward_seconds:.1f} ms forward, "
        f"{1e3 * stage.backward_seconds:.1f} ms backward, of both {100 * stage.tensor_seconds / both:.1f} % wait for "
        "tensor-parallel collectives",
        f"  bubble {100 * plan.bubble:.1f} %",
        f"  {plan.tokens_per_second:,.0f} tokens/s, {plan.tokens_per_second / plan.cluster.world_size:,.0f} a GPU",
        f"  MFU {100 * plan.mfu:.1f} % (6 x parameters)",
        f"  MFU {100 * plan.mfu_with_attention:.1f} % (with causal attention, without the embedding)",
        f"  hardware {plan.hardware_flops / 1e12:.0f} TFLOP/s a GPU = {100 * plan.hardware_share:.1f} % "
        "(recomputation and all pairs of attention, as SC21 counts)",
    ]


def search_as_text(result: SearchResult, cluster: Cluster) -> str:
    """The best plans as a table, then the sizes of which none fits and why."""
    world = cluster.world_size
    rows = [
        f"{result.fitting} of {result.tried} plans fit {cluster.name}",
        f"the fastest, at most {PLANS_OF_A_SIZE} of a size:",
        f"  {'tokens/s':>9} {'MFU 6N':>7} {'bubble':>7} {'GiB':>6}  cut",
    ]
    for plan in result.best:
        memory = max(stage.memory.total for stage in plan.stages) / GIB
        rows.append(
            f"  {plan.tokens_per_second:>9,.0f} {100 * plan.mfu:>6.1f}% {100 * plan.bubble:>6.1f}% {memory:>6.1f}  "
            f"{cut_in_words(plan)}"
        )
    rows += [
        "",
        f"every size (tensor divides a node's {cluster.gpus_per_node}, tensor x pipeline the world's {world})",
    ]
    for size in result.sizes:
        speed = f"{size.tokens_per_second:>9,.0f} tokens/s" if size.tokens_per_second else "     does not fit"
        rows.append(f"  tensor {size.tensor} x pipeline {size.pipeline:<3} {speed}: {size.reason}")
    return "\n".join(rows)


_MEANING = {
    "tp": "tensor",
    "pp": "pipeline",
    "dp_shard": "data",
    "dp_replicate": "data (replicas)",
    "batch": "data (all ranks)",
    "embedding": "embedding",
    "world": "world",
}


def _traffic(plan: Plan) -> list[str]:
    rows = ["traffic of one rank and step: whole tensors", f"  {'stage':>5} {'group':<16} {'calls':>9} {'bytes':>12}"]
    for number, stage in enumerate(plan.stages):
        if number not in (0, len(plan.stages) // 2, len(plan.stages) - 1):
            continue
        for group, value in stage.traffic.items():
            rows.append(f"  {number:>5} {_MEANING[group]:<16} {value.calls:>9,} {_in_words(value.size):>12}")
    return rows


def _in_words(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def _assumption_lines(plan: Plan) -> list[str]:
    rows = [f"assumptions ({plan.cluster.accelerator.name}; known kinds: {', '.join(KINDS)})"]
    for item in assumptions(plan):
        value = item["value"]
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        rows.append(f"  {item['name']} = {shown}: {item['source']}")
    return rows + [f"  {line}" for line in MODEL_ASSUMPTIONS]
