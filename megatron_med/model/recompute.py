"""Activations that are computed again in the backward pass instead of kept (Chen et al. 2016).

Dropout masks follow from the names of their regions, so no generator state has to be saved and restored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Recompute:
    """What is computed again.

    Attributes:
        mode: none; selective, the attention core where its probabilities would be kept (Korthikanti et al. 2022);
            full, whole layers.
        interval: full: every n-th layer of the model.
    """

    mode: Literal["none", "selective", "full"] = "none"
    interval: int = 1

    def whole_layer(self, index: int) -> bool:
        """Whether the layer with this global index is computed again."""
        return self.mode == "full" and index % self.interval == 0

    @property
    def attention_core(self) -> bool:
        """Whether attention probabilities are computed again."""
        return self.mode == "selective"


KEEP_ALL = Recompute()


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function(*inputs)``; of its activations only the inputs are kept."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
