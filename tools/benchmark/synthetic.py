"""Random batches and a run without files, for the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from megatron_med.config.presets import PRESETS
from megatron_med.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megatron_med.model.batch import plain_batch
from megatron_med.parallel.context import ParallelContext
from megatron_med.train.setup import build_train_module
from megatron_med.train.step import TrainModule, train_step
from megatron_med.train.timers import StepTimer


def make_config(
    preset: str, sequence_length: int, micro_batch_size: int, precision: str, parallel: ParallelConfig | None = None
) -> Config:
    """A run of a preset that reads and writes no files."""
    return Config(
        model=ModelConfig(**PRESETS[preset]),
        data=DataConfig(sequence_length=sequence_length),
        train=TrainConfig(
            steps=1, global_batch_size=micro_batch_size, output_dir="unused", micro_batch_size=micro_batch_size
        ),
        parallel=parallel or ParallelConfig(),
        precision=precision,  # type: ignore[arg-type]
    )


def random_ids(config: Config, device: torch.device, seed: int = 0) -> torch.Tensor:
    """``[micro_batch, sequence + 1]`` token ids."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config.train.micro_batch_size, config.data.sequence_length + 1)
    return torch.randint(config.model.vocab_size, shape, generator=generator).to(device)


def make_step(
    config: Config, context: ParallelContext, ids: torch.Tensor, micro_batches: int = 1
) -> tuple[TrainModule, Callable[[], object]]:
    """The train_module of a run, and one training step of it."""
    train_module = build_train_module(config, context)
    batches = [plain_batch(ids[:, :-1], ids[:, 1:])] * micro_batches
    return train_module, lambda: train_step(train_module, batches, 1e-4, False, StepTimer(context.device))


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call, the device synchronised."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
