"""Predicts published training runs with the planner and prints them beside what was measured.

The software of each run is an input (fused or separate element-wise kernels, attention, overlap, network cards); no
figure of the planner was fitted to any of them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

from megatron_med.config.presets import PRESETS
from megatron_med.config.schema import Config, DataConfig, ModelConfig, OverlapConfig, ParallelConfig, TrainConfig
from megatron_med.model.flops import parameter_flops_per_token
from megatron_med.plan.cluster import parse_cluster
from megatron_med.plan.cost_model import KernelAssumptions
from megatron_med.plan.predict import Plan, plan

NO_OVERLAP = OverlapConfig(gradient_reduce=False, weight_gather=False, tensor=False, pipeline=False)
TENSOR_OVERLAP = OverlapConfig(gradient_reduce=False, weight_gather=False, tensor=True, pipeline=False)


@dataclass(frozen=True)
class PublishedRun:
    """A run of which the speed was published.

    Attributes:
        measured: tokens/s of the cluster, or the quantity that ``unit`` names.
        unit: tokens/s; hardware TFLOP/s, of a GPU as SC21 counts; MFU %, as llm-foundry counts: 6 x parameters and
            all pairs of attention.
    """

    name: str
    config: Config
    cluster: str
    kernels: KernelAssumptions
    measured: float
    unit: str
    nics: int | None = None

    def predicted(self, result: Plan) -> float:
        """The same quantity of a plan."""
        if self.unit == "tokens/s":
            return result.tokens_per_second
        if self.unit == "hardware TFLOP/s":
            return result.hardware_flops / 1e12
        model, length = result.config.model, result.config.data.sequence_length
        attention = 12.0 * model.num_layers * model.num_attention_heads * model.head_dim * length
        peak = result.cluster.world_size * result.cluster.accelerator.peak_flops
        return 100 * result.tokens_per_second * (parameter_flops_per_token(model) + attention) / peak


def _config(
    model: dict[str, Any],
    length: int,
    micro: int,
    batch: int,
    *,
    recompute: Any = "none",
    precision: Any = "bf16",
    **parallel: Any,
) -> Config:
    return Config(
        model=ModelConfig(**model),
        data=DataConfig(sequence_length=length),
        train=TrainConfig(steps=1, micro_batch_size=micro, global_batch_size=batch, output_dir="RUN"),
        parallel=ParallelConfig(**parallel),
        recompute=recompute,
        precision=precision,
    )


def _gpt(layers: int, hidden: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "family": "gpt2",
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
    }


def _sc21(
    name: str,
    shape: tuple[int, int, int],
    cut: tuple[int, int, int],
    batch: tuple[int, int],
    gpus: int,
    measured: float,
) -> PublishedRun:
    """A row of Narayanan et al. 2021, table 1: interleaved where there is a pipeline, fused kernels, no overlap, no
    sequence parallelism, attention with all scores in memory, everything recomputed."""
    layers, hidden, heads = shape
    tensor, pipeline, chunks = cut
    config = _config(
        _gpt(layers, hidden, heads, 51200),
        2048,
        *batch,
        recompute="full",
        precision="fp16",
        tensor=tensor,
        pipeline=pipeline,
        virtual_stages=chunks,
        schedule="interleaved" if chunks > 1 else "1f1b",
        layers_per_stage=[layers // pipeline // chunks] * (pipeline * chunks),
        sharding="none",
        sequence_parallel=False,
        overlap=NO_OVERLAP,
    )
    kernels = KernelAssumptions("fused", "scores", "blocking")
    return PublishedRun(f"SC21 {name}", config, f"a100-80g:{gpus // 8}x8", kernels, measured, "hardware TFLOP/s")


RUNS = [
    PublishedRun(
        "Meditron 70B",
        _config(
            PRESETS["llama2-70b"],
            4096,
            2,
            512,
            recompute="selective",
            tensor=8,
            pipeline=8,
            layers_per_stage=[10] * 8,
            sharding="none",
            overlap=TENSOR_OVERLAP,
        ),
        "a100-80g:16x8",
        KernelAssumptions("separate", "flash1", "blocking"),
        40200,
        "tokens/s",
        nics=1,
    ),
    _sc21("7.5B", (36, 4096, 32), (4, 1, 1), (16, 512), 128, 142),
    _sc21("39.1B", (48, 8192, 64), (8, 2, 2), (4, 1536), 512, 138),
    _sc21("145.6B", (80, 12288, 96), (8, 8, 2), (2, 2304), 1536, 148),
    PublishedRun(
        "llm-foundry 70B",
        _config(_gpt(80, 8192, 64, 50432), 2048, 8, 2048, recompute="full", sharding="full"),
        "a100-80g:8x8",
        KernelAssumptions("fused", "flash2"),
        53.3,
        "MFU %",
    ),
    PublishedRun(
        "llm-foundry 7B",
        _config(_gpt(32, 4096, 32, 50432), 2048, 6, 96, sharding="full"),
        "a100-80g:1x8",
        KernelAssumptions("fused", "flash2"),
        64.2,
        "MFU %",
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    rows = [compare(run) for run in RUNS]
    print(json.dumps(rows, indent=1) if arguments.json else as_table(rows))


def compare(run: PublishedRun) -> dict[str, Any]:
    """Predicted and measured of one run."""
    result = plan(run.config, parse_cluster(run.cluster, run.nics), run.kernels)
    predicted = run.predicted(result)
    return {
        "run": run.name,
        "cluster": run.cluster,
        "unit": run.unit,
        "measured": run.measured,
        "predicted": predicted,
        "difference": predicted / run.measured - 1,
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    """The comparison as a Markdown table."""
    lines = ["| run | cluster | unit | measured | predicted | difference |", "|---|---|---|---|---|---|"]
    for row in rows:
        digits = 0 if row["measured"] > 100 else 1
        lines.append(
            f"| {row['run']} | {row['cluster']} | {row['unit']} | {row['measured']:,.{digits}f} | "
            f"{row['predicted']:,.{digits}f} | {100 * row['difference']:+.0f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
