"""Chooses the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_med.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens; 0: all.
        top_p: only the most likely tokens whose probabilities add up to p (Holtzman et al. 2020).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        faults = []
        if not 0 <= self.temperature < math.inf:
            faults.append(f"temperature is {self.temperature}: it must be a number of at least 0.")
        if self.top_k < 0:
            faults.append(f"top-k is {self.top_k}: it must be at least 0 (0: all tokens).")
        if not 0 < self.top_p <= 1:
            faults.append(f"top-p is {self.top_p}: it must lie above 0 and up to 1.")
        if self.temperature == 0 and not faults and (self.top_k > 1 or self.top_p < 1):
            faults.append(
                f"top-k is {self.top_k} and top-p {self.top_p} with temperature 0, which takes the most likely token: "
                "set a temperature above 0, or leave them out."
            )
        if faults:
            raise ConfigError(faults)


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """``[batch, vocabulary]`` fp32 logits -> ``[batch]`` ids."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).double() / sampling.temperature  # the best one stays 0
    if sampling.top_k:
        lowest = scaled.topk(min(sampling.top_k, scaled.shape[-1])).values[..., -1:]
        scaled = scaled.masked_fill(scaled < lowest, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        scaled = scaled.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), float("-inf"))
    return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator).squeeze(-1)
