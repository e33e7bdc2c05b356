"""Reports of a run: console, metrics.jsonl, TensorBoard, Weights & Biases. All on rank 0."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_med.config.schema import Config
from megatron_med.errors import ConfigError
from megatron_med.model.flops import PEAK_FLOPS
from megatron_med.train.run_folder import RunFolder
from megatron_med.train.samples import Sample

Metrics = dict[str, Any]


def peak_flops(device: torch.device) -> float | None:
    """Peak of this device; None where it is not in the table (a CPU, for one)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def memory_bytes(device: torch.device) -> int:
    """Largest memory this process has held: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class Reporter(Protocol):
    """Takes the metrics of one step, and the texts that the model has written at it."""

    def report(self, metrics: Metrics) -> None: ...

    def show(self, step: int, samples: Sequence[Sample]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One object a step in one file and one object a text in another, flushed at once."""

    def __init__(self, path: Path, samples: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._samples = samples

    def report(self, metrics: Metrics) -> None:
        finite = {name: None if _not_finite(value) else value for name, value in metrics.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        with self._samples.open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps({"step": step, **asdict(sample)}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


class Console:
    """One line every ``interval`` steps."""

    def __init__(self, interval: int, steps: int) -> None:
        self._interval = interval
        self._steps = steps

    def report(self, metrics: Metrics) -> None:
        step = metrics["step"]
        if step % self._interval and step != self._steps and "valid_loss" not in metrics:
            return
        parts = [
            f"step {step:>{len(str(self._steps))}}/{self._steps}",
            f"loss {metrics['loss']:.4f}",
            f"lr {metrics['lr']:.2e}",
            f"grad norm {metrics['grad_norm']:.3f}",
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
            f"{metrics['tflops_per_device']:.3g} TFLOP/s per device",
        ]
        if metrics["mfu"] is not None:
            parts.append(f"MFU {metrics['mfu']:.1%}")
        parts.append(f"ETA {_duration(metrics['eta_seconds'])}")
        if "valid_loss" in metrics:
            parts.append(f"valid loss {metrics['valid_loss']:.4f}")
        if metrics["skipped"]:
            parts.append("SKIPPED: gradients not finite")
        print(" | ".join(parts), flush=True)

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        for sample in samples:
            print(f"  {sample.prompt!r} -> {sample.text!r}", flush=True)

    def close(self) -> None:
        """Nothing to close."""


class TensorBoard:
    """Every number as a scalar."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def report(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name not in ("step", "time"):
                self._writer.add_scalar(name, value, metrics["step"])

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        for number, sample in enumerate(samples):
            text = f"**{html.escape(sample.prompt)}**\n\n{html.escape(sample.text)}"
            self._writer.add_text(f"samples/{number}", text, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Reports to W&B; needs the extra of that name."""

    def __init__(self, config: Config) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("logging.wandb is true: install it with pip install 'megatron_med[wandb]'.") from error
        self._run = wandb.init(project="megatron_med", dir=config.train.output_dir, resume="allow")

    def report(self, metrics: Metrics) -> None:
        self._run.log(metrics, step=metrics["step"])

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        self._run.log({f"samples/{number}": sample.text for number, sample in enumerate(samples)}, step=step)

    def close(self) -> None:
        self._run.finish()


def make_reporters(config: Config, folder: RunFolder, resumed_step: int) -> list[Reporter]:
    """The reporters a configuration asks for."""
    console = Console(config.logging.interval, config.train.steps)
    reporters: list[Reporter] = [JsonLines(folder.metrics, folder.samples), console]
    if config.logging.tensorboard:
        reporters.append(TensorBoard(folder.tensorboard, resumed_step))
    if config.logging.wandb:
        reporters.append(WeightsAndBiases(config))
    return reporters


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
