"""Keys and values of earlier tokens, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Grows by the new tokens of each forward pass; one per stage."""

    def __init__(self) -> None:
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends ``[seq, batch, groups, head_dim]`` to a layer and returns all of it."""
        if layer in self._keys:
            key = torch.cat((self._keys[layer], key))
            value = torch.cat((self._values[layer], value))
        self._keys[layer], self._values[layer] = key, value
        return key, value
