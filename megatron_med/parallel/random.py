"""Randomness that does not depend on the topology: every draw has a generator seeded by what it is for."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed out of names and numbers; equal parts give equal seeds on every machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator_of(*parts: int | str, device: torch.device | None = None) -> torch.Generator:
    """A generator seeded by ``seed_of(*parts)``."""
    return torch.Generator(device=device or torch.device("cpu")).manual_seed(seed_of(*parts))


class DropoutRegion:
    """One place of the model that drops values.

    Masks follow from (seed, step, global index of the micro-batch, layer, region) and, where tensor-parallel
    ranks hold different shards of the region, from their coordinate. They are equal when a layer is computed
    again, after a resume and under any data-parallel size; no generator state is kept.

    Args:
        probability: share of values that are set to zero.
        name: layer and region, e.g. ``layers.3.mlp``.
        shard: coordinate of this rank's shard; 0 where all ranks hold the same values.
    """

    def __init__(self, probability: float, name: str, shard: int = 0) -> None:
        self.probability = probability
        self.name = name
        self.shard = shard

    def seed(self, key: str) -> int:
        """Seed for the micro-batch named by ``key``."""
        return seed_of(key, self.name, self.shard)

    def __call__(self, tensor: Tensor, key: str, training: bool) -> Tensor:
        """Drops values of ``tensor`` and scales the others by 1 / (1 - probability)."""
        if not training or self.probability == 0:
            return tensor
        generator = torch.Generator(device=tensor.device).manual_seed(self.seed(key))
        keep = torch.empty_like(tensor).bernoulli_(1 - self.probability, generator=generator)
        return tensor * keep / (1 - self.probability)
