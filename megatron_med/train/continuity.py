"""What a resumed run does otherwise than before, and how long its learning rate decays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_med.checkpoint.folder import CheckpointState
from megatron_med.config import Config
from megatron_med.config.reader import read_yaml
from megatron_med.config.validate import warmup_faults
from megatron_med.errors import CheckpointError, ConfigError
from megatron_med.kernels.backend import serving
from megatron_med.train.run_folder import CONFIG, CONFIG_BEFORE

Settings = dict[str, Any]
"""Option -> value: everything that shapes the loss curve and may differ between starts."""

_DECAY = "lr_schedule.decay_steps"
_STEPS = "train.steps"
_SINGLE = (_STEPS, "train.global_batch_size", "train.valid_samples", "precision")
_SECTIONS = ("optimizer", "lr_schedule", "lora", "quantize")
_PLACES = ("lora.base",)
_DROPOUTS = ("model.embedding_dropout", "model.hidden_dropout", "model.attention_dropout")


def settings_of(config: Config, horizon: int, device: str) -> Settings:
    """The settings of a start, as ``state.json`` holds them. ``lr_schedule.decay_steps`` is the horizon itself,
    ``kernels`` what serves on the device: other kernels round otherwise."""
    return _select(asdict(config)) | {_DECAY: horizon, "kernels": serving(device)}


def settings_before(source: Path, state: CheckpointState) -> Settings:
    """The settings under which a checkpoint was trained. One of an older version does not tell them: the
    configuration of its run's first start does. Empty where nobody knows."""
    if state.settings:
        return state.settings
    with suppress(ConfigError):
        run = source.parent.parent
        first = CONFIG_BEFORE if (run / CONFIG_BEFORE).is_file() else CONFIG
        tree = read_yaml(run / first, "configuration of the run")
        if isinstance(tree, dict):
            settings = _select(tree)
            return settings | {_DECAY: settings.get(_DECAY) or settings.get(_STEPS)}
    return {}


def decay_horizon(config: Config, before: Settings) -> int:
    """The step at which the learning rate's decay ends: the one that is given, else that of the run's first start.

    Raises:
        ConfigError: the warm-up would be longer.
    """
    schedule = config.lr_schedule
    horizon = schedule.decay_steps or before.get(_DECAY) or config.train.steps
    if not isinstance(horizon, int):
        raise CheckpointError(
            f"the checkpoint's settings hold {_DECAY} = {horizon!r}: no step. Restore its state.json."
        )
    faults = list(warmup_faults(schedule, horizon))
    if faults:
        raise ConfigError(faults)
    return horizon


def changes(before: Settings, now: Settings, step: int) -> Iterator[str]:
    """One line for each setting that is not what it was up to ``step``."""
    before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            yield f"changed from step {step + 1} on: {name} {_in_words(before[name])} -> {_in_words(now[name])}"


def beyond_horizon(config: Config, horizon: int, step: int) -> str | None:
    """Warns of steps after the end of a decay that nobody has set for this start: they have the lowest learning rate.

    Args:
        config: of this start.
        horizon: step at which the decay ends.
        step: that the run goes on from.
    """
    schedule = config.lr_schedule
    if schedule.decay_steps is not None or schedule.name == "constant" or config.train.steps <= horizon:
        return None
    first = max(horizon, step) + 1
    return (
        f"warning: the learning rate's decay ends at step {horizon}, as this run's first start has set it: steps "
        f"{first} to {config.train.steps} have lr_schedule.min_lr = {schedule.min_lr:g}. To decay longer, set "
        f"{_DECAY}: the learning rate then jumps to the longer curve."
    )


def _select(tree: dict[str, Any]) -> Settings:
    """The settings among the options of a configuration; a file of an older version may lack some."""
    flat = {
        f"{section}.{key}": value
        for section, options in tree.items()
        if isinstance(options, dict)
        for key, value in options.items()
    } | {key: value for key, value in tree.items() if not isinstance(value, dict)}
    names = [name for name in flat if name in _SINGLE or (name.partition(".")[0] in _SECTIONS and name not in _PLACES)]
    if any(flat.get(name) for name in _DROPOUTS):
        names.append("train.micro_batch_size")  # masks are seeded by micro-batch
    return {name: flat[name] for name in names if name in flat}


def _in_words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
