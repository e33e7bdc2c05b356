"""Learning rate as a function of the step."""

from __future__ import annotations

import math

from megatron_med.config.schema import LRScheduleConfig


def learning_rate(config: LRScheduleConfig, peak: float, step: int, horizon: int) -> float:
    """Learning rate of optimizer step ``step``, counted from 1.

    Linear rise to the peak at ``warmup_steps``; then cosine (Loshchilov and Hutter 2017), linear or no decay to
    ``min_lr`` at ``decay_steps`` (``horizon`` where that is null), and ``min_lr`` beyond.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return peak * step / warmup
    if config.name == "constant":
        return peak
    end = config.decay_steps if config.decay_steps is not None else horizon
    progress = min(1.0, (step - warmup) / max(1, end - warmup))
    if config.name == "linear":
        return peak + (config.min_lr - peak) * progress
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
