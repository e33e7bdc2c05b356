"""What each way of tuning takes: planned and measured."""

from __future__ import annotations

import pytest
import torch

from megatron_med.config import Config
from megatron_med.config.schema import LoRAConfig, QuantizeConfig
from megatron_med.parallel.random import generator_of
from megatron_med.parallel.tensor_parallel.quantized import quantized_weights
from megatron_med.plan.cluster import KINDS, Cluster
from megatron_med.plan.memory import Memory
from megatron_med.plan.predict import plan
from megatron_med.tracing.recorder import Recorder
from tests.ranks import run_ranks
from tests.training import MEMORY_GRIDS, ProductsInFP32, memory_config, one_step, set_up

WAYS = {
    "full": None,
    "lora": QuantizeConfig(),
    "int8": QuantizeConfig(base="int8"),
    "int8, the paper's rule": QuantizeConfig(base="int8", outliers="paper"),
    "nf4": QuantizeConfig(base="nf4"),
}
ON_ONE_RANK = [("one rank", way, name) for way in WAYS for name in ("adamw", "adamw8bit")]
"""Of Llama; of GPT-2 every other one."""
CUT = [
    ("optimizer sharded", "int8", "adamw8bit"),
    ("optimizer sharded", "full", "adamw8bit"),
    ("two stages", "nf4", "adamw8bit"),
    ("fully sharded", "int8", "adamw"),
    ("fully sharded", "full", "adamw8bit"),
]


def _measured(config: Config) -> int:
    """The peak of two steps beside weights that are numbers."""
    recorder = Recorder()
    with recorder:
        train_module, loader = set_up(config)
    for weight in quantized_weights(train_module.chunks):
        shape = weight.layout.local_shape(train_module.context.tp)
        values = torch.randn(shape, generator=generator_of("footprint", weight.layout.name))
        weight.fill((values * 0.02).to(weight.dtype))
    for step in (1, 2):
        with ProductsInFP32(), recorder, recorder.section():
            one_step(train_module, loader, step, config.train.global_batch_size)
    return recorder.peak


def _planned(config: Config, ranks: int) -> list[Memory]:
    return [stage.memory for stage in plan(config, Cluster(KINDS["a100-80g"], 1, ranks), device="cpu").stages]


@pytest.mark.parametrize(
    ("grid", "way", "optimizer", "family"),
    [(*case, "llama") for case in ON_ONE_RANK + CUT] + [(*case, "gpt2") for case in ON_ONE_RANK[1::4] + CUT],
)
def test_a_footprint_is_the_planned_one(sample_data: object, grid: str, way: str, optimizer: str, family: str) -> None:
    ranks = MEMORY_GRIDS[grid][0]
    config = memory_config(sample_data, grid, family)  # type: ignore[arg-type]
    config.optimizer.name = optimizer  # type: ignore[assignment]
    quantize = WAYS[way]
    if quantize is not None:
        config.lora = LoRAConfig(rank=40, alpha=16, dropout=0.1)
        config.checkpoint.load = "base"
        config.quantize = quantize
    planned = _planned(config, ranks)
    for rank, peak in enumerate(run_ranks(ranks, _measured, config)):
        assert planned[rank * len(planned) // ranks].total == pytest.approx(peak, rel=0.05), f"rank {rank}"
    if grid != "one rank" or family != "llama":
        return
    if optimizer == "adamw8bit":
        config.optimizer.name = "adamw"
        assert planned[0].optimizer < _planned(config, ranks)[0].optimizer
    if way in ("int8", "nf4"):
        config.quantize = QuantizeConfig()
        assert planned[0].weights < _planned(config, ranks)[0].weights * (0.75 if way == "int8" else 0.6)
