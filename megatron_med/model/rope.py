"""Rotary position frequencies, with the linear and the Llama-3.1 scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_med.config import ModelConfig
from megatron_med.config.schema import RopeScaling


def inv_freq(config: ModelConfig) -> Tensor:
    """theta^(-2i / head_dim) for i in 0 .. head_dim/2, scaled as the configuration says; fp32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.type == "linear":
        return frequencies / scaling.factor
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long waves divided by the factor, short ones kept, a linear blend between (Llama 3.1 model card)."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


class RotaryEmbedding:
    """Cosines and sines for given positions."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._frequencies = inv_freq(config).to(device)
        self._dtype = dtype

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions ``[batch, seq]`` -> cos and sin, ``[seq, batch, 1, head_dim]`` each; angles in fp32."""
        angles = positions.t().unsqueeze(-1) * self._frequencies
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
        return angles.cos().to(self._dtype), angles.sin().to(self._dtype)
