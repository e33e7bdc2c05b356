"""Random batches and a run without files, for the benchmarks."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

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


def seconds_in_turns(
    contestants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each in every round, after ``warm_up`` rounds that do not count. All take turns, so that a busy
    machine slows them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + warm_up):
        for name, run in contestants.items():
            elapsed = seconds_of(run, device)
            if turn >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def medians_in_turns(
    contestants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of each; see ``seconds_in_turns``."""
    seconds = seconds_in_turns(contestants, rounds, device, warm_up)
    return {name: statistics.median(times) for name, times in seconds.items()}


def step_parser(description: str | None, steps: int, micro_batches: int = 0) -> argparse.ArgumentParser:
    """What a benchmark of training steps asks: model, batch, precision, steps; under torchrun micro-batches, else
    threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-10m", choices=sorted(PRESETS))
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=2 if micro_batches else 4)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=steps)
    if micro_batches:
        parser.add_argument("--micro-batches", type=int, default=micro_batches)
    else:
        parser.add_argument("--threads", type=int, default=2)
    return parser
