"""Dynamic loss scale for fp16 (Micikevicius et al. 2018): gradients too small for fp16 are lifted into its range."""

from __future__ import annotations

from megatron_med.config.schema import OptimizerConfig


class LossScaler:
    """Factor of the loss in the backward pass: halved when gradients overflow, doubled after a window without.

    Attributes:
        scale: a power of two times the initial scale.
        good_steps: without overflow since the last change.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        self._window = config.loss_scale_window
        self._minimum = config.min_loss_scale
        self.scale = config.initial_loss_scale
        self.good_steps = 0

    @property
    def at_minimum(self) -> bool:
        """Whether the scale cannot be lowered."""
        return self.scale <= self._minimum

    def update(self, overflow: bool) -> None:
        """After every step."""
        if overflow:
            self.scale = max(self._minimum, self.scale / 2)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps >= self._window:
            self.scale *= 2
            self.good_steps = 0

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from ``state_dict``."""
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
