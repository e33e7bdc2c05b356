"""Reports of a run: console, metrics.jsonl, TensorBoard, Weights & Biases. All on rank 0."""

from __future__ import annotations

import html
import json
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import yaml

from megatron_med.config import dump_config
from megatron_med.config.schema import Config
from megatron_med.errors import ConfigError
from megatron_med.files import write_text
from megatron_med.train.metrics import Metrics
from megatron_med.train.run_folder import RunFolder
from megatron_med.train.samples import Sample

_PATIENCE = 30.0
"""Seconds without a word from the console."""
_TRAIN = ("loss", "lr", "grad_norm", "loss_scale", "consumed_tokens")
_SPEED = ("tokens_per_second", "tflops_per_device", "mfu", "memory_bytes")


def in_groups(metrics: Metrics) -> Iterator[tuple[str, float]]:
    """The numbers that a curve is drawn of, under the names of its group: ``train/``, ``valid/``, ``speed/``."""
    for name, value in metrics.items():
        if not isinstance(value, int | float):
            continue
        if name in _TRAIN:
            yield f"train/{name}", value
        elif name == "skipped" and value:
            yield "train/skipped", 1.0
        elif name == "valid_loss":
            yield "valid/loss", value
        elif name in _SPEED or (name.endswith("_seconds") and name != "eta_seconds"):
            yield f"speed/{name}", value


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
    """One line every ``interval`` steps, for the first step, and where the last line is half a minute old."""

    def __init__(self, interval: int, steps: int) -> None:
        self._interval = interval
        self._steps = steps
        self._told = -math.inf

    def report(self, metrics: Metrics) -> None:
        step = metrics["step"]
        is_due = step % self._interval == 0 or step == self._steps or "valid_loss" in metrics
        if not is_due and metrics["time"] < self._told + _PATIENCE:
            return
        self._told = metrics["time"]
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
    """The curves, in groups."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def report(self, metrics: Metrics) -> None:
        for name, value in in_groups(metrics):
            self._writer.add_scalar(name, value, metrics["step"])

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        for number, sample in enumerate(samples):
            text = f"**{html.escape(sample.prompt)}**\n\n{html.escape(sample.text)}"
            self._writer.add_text(f"samples/{number}", text, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Reports to W&B; needs the extra of that name. All starts of a RUN are one run there: its id is kept in RUN."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("logging.wandb is true: install it with pip install 'megatron_med[wandb]'.") from error
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "megatron_med"),
            name=os.environ.get("WANDB_NAME", folder.path.name),
            id=_wandb_id(folder),
            resume="allow",
            dir=str(folder.path),
            config=yaml.safe_load(dump_config(config)),
        )

    def report(self, metrics: Metrics) -> None:
        self._run.log(dict(in_groups(metrics)), step=metrics["step"])

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        self._run.log({f"samples/{number}": sample.text for number, sample in enumerate(samples)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb_id(folder: RunFolder) -> str:
    """``WANDB_RUN_ID``, else that of the RUN's first start."""
    given = os.environ.get("WANDB_RUN_ID")
    if given:
        return given
    if not folder.wandb_id.is_file():
        write_text(folder.wandb_id, secrets.token_hex(4) + "\n")
    return folder.wandb_id.read_text(encoding="utf-8").strip()


def make_reporters(config: Config, folder: RunFolder, resumed_step: int) -> list[Reporter]:
    """The reporters a configuration asks for."""
    console = Console(config.logging.interval, config.train.steps)
    reporters: list[Reporter] = [JsonLines(folder.metrics, folder.samples), console]
    if config.logging.tensorboard:
        reporters.append(TensorBoard(folder.tensorboard, resumed_step))
    if config.logging.wandb:
        reporters.append(WeightsAndBiases(config, folder))
    return reporters


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
