"""Chooses the next token from logits: the processors of ``transformers``, in its order, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_med.errors import ConfigError

NOT_FINITE = -1
"""Stands for a token where logits are NaN or infinite."""


_MOST_BEAMS = 1000


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens; 0: all.
        top_p: only the most likely tokens whose probabilities add up to p (Holtzman et al. 2020).
        min_p: only tokens at least this share of the most likely one's probability (Nguyen et al. 2024).
        repetition_penalty: divides the positive logits of tokens of prompt and answer, multiplies the negative ones
            (Keskar et al. 2019).
        frequency_penalty: is taken from a token's logit for every time that the answer holds it (OpenAI's API, vLLM).
        no_repeat_ngram_size: no n tokens in a row come twice; 0: they may.
        beams: hypotheses of a beam search; 1: none.
        length_penalty: power of the length that divides the log-likelihood of a finished beam.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        faults = []
        if not 0 <= self.temperature < math.inf:
            faults.append(f"temperature is {self.temperature}: it must be a number of at least 0.")
        if self.top_k < 0:
            faults.append(f"top-k is {self.top_k}: it must be at least 0 (0: all tokens).")
        if not 0 < self.top_p <= 1:
            faults.append(f"top-p is {self.top_p}: it must lie above 0 and up to 1.")
        if not 0 <= self.min_p <= 1:
            faults.append(f"min-p is {self.min_p}: it must lie between 0 and 1.")
        if not 0 < self.repetition_penalty < math.inf:
            faults.append(f"repetition-penalty is {self.repetition_penalty}: it must be above 0 (1: none).")
        if not math.isfinite(self.frequency_penalty):
            faults.append(f"frequency-penalty is {self.frequency_penalty}: it must be a number (0: none).")
        if self.no_repeat_ngram_size < 0:
            faults.append(f"no-repeat-ngram-size is {self.no_repeat_ngram_size}: it must be at least 0 (0: off).")
        if not 1 <= self.beams <= _MOST_BEAMS:
            faults.append(f"beams is {self.beams}: it must be at least 1 and at most {_MOST_BEAMS}.")
        if not math.isfinite(self.length_penalty):
            faults.append(f"length-penalty is {self.length_penalty}: it must be a number.")
        if not faults:
            faults += self._contradictions()
        if faults:
            raise ConfigError(faults)

    def _contradictions(self) -> list[str]:
        filters = f"top-k is {self.top_k} and top-p {self.top_p}" + (f" and min-p {self.min_p}" if self.min_p else "")
        is_filtered = self.top_k > 1 or self.top_p < 1 or self.min_p > 0
        if self.beams > 1 and (self.temperature or is_filtered):
            return ["beam search takes the most likely text: leave out temperature, top-k, top-p and min-p."]
        if self.temperature == 0 and is_filtered:
            return [
                f"{filters} with temperature 0, which takes the most likely token: set a temperature above 0, or leave "
                "them out."
            ]
        if self.beams == 1 and self.length_penalty != 1:
            return [f"length-penalty is {self.length_penalty} without beams: set beams above 1, or leave it out."]
        return []

    @property
    def is_plain(self) -> bool:
        """Whether the token with the highest logit is taken, whatever came before."""
        return self.temperature == 0 and self.beams == 1 and not self.reads_history

    @property
    def reads_history(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.no_repeat_ngram_size > 0


GREEDY = Sampling()
"""The most likely token."""


@dataclass(frozen=True)
class History:
    """What a row holds so far: the ids of its prompt and of its answer."""

    prompt: Sequence[int]
    answer: Sequence[int]


def choose(
    logits: Tensor, sampling: Sampling, histories: Sequence[History], generators: Sequence[torch.Generator]
) -> Tensor:
    """``[rows, vocabulary]`` fp32 logits -> ``[rows]`` ids, NOT_FINITE for a row with broken logits.

    Args:
        logits: are overwritten where earlier tokens change them.
        sampling: how.
        histories: of the rows.
        generators: one a row, on the CPU: what is drawn for a row depends on nothing else.
    """
    broken = ~logits.isfinite().all(dim=-1)
    if sampling.reads_history:
        penalise(logits, sampling, histories)
        broken |= (logits.isnan() | (logits == math.inf)).any(dim=-1)  # a penalty near 0 is no number any more
    if sampling.temperature == 0:
        chosen = logits.argmax(dim=-1)
    else:
        drawn = [torch.rand((), generator=generator, dtype=torch.float64) for generator in generators]
        chosen = _drawn(logits, sampling, torch.stack(drawn).to(logits.device))
    return chosen.masked_fill(broken, NOT_FINITE)


def penalise(scores: Tensor, sampling: Sampling, histories: Sequence[History]) -> None:
    """Lowers the scores of earlier tokens, in place."""
    if sampling.repetition_penalty != 1:
        rows, ids = _places([[*history.prompt, *history.answer] for history in histories], scores.device)
        old = scores[rows, ids]
        penalty = sampling.repetition_penalty
        scores[rows, ids] = torch.where(old < 0, old * penalty, old / penalty)
    if sampling.frequency_penalty:
        rows, ids = _places([history.answer for history in histories], scores.device)
        amount = scores.new_full((1,), -sampling.frequency_penalty).expand(len(ids))
        scores.index_put_((rows, ids), amount, accumulate=True)
    if sampling.no_repeat_ngram_size:
        size = sampling.no_repeat_ngram_size
        banned = [_completions([*history.prompt, *history.answer], size) for history in histories]
        scores[_places(banned, scores.device)] = -math.inf


def _places(ids: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and id of each."""
    rows = [row for row, of_row in enumerate(ids) for _ in of_row]
    flat = [token for of_row in ids for token in of_row]
    pair = torch.tensor([rows, flat], dtype=torch.int64, device=device)
    return pair[0], pair[1]


def _completions(tokens: Sequence[int], size: int) -> list[int]:
    """Tokens that would end an n-gram which stands in the text already."""
    if len(tokens) < size:
        return []
    begin = tokens[len(tokens) - size + 1 :]
    starts = range(len(tokens) - size + 1)
    return [tokens[start + size - 1] for start in starts if tokens[start : start + size - 1] == begin]


def probabilities(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """What a token is drawn from at a temperature above 0.

    Returns:
        fp64 probabilities ``[rows, candidates]``, 0 where a filter leaves a token out, not normalised after that; and
        the candidates' ids, None: all ids in their order.
    """
    values, ids = _candidates(logits, sampling)
    values = values.double()
    best = values.amax(dim=-1, keepdim=True)
    shares = ((values - best) / sampling.temperature).softmax(dim=-1)  # the best one stays 0
    if sampling.top_p < 1:
        before = shares.cumsum(dim=-1) - shares
        shares = shares.masked_fill(before >= sampling.top_p, 0)
    if sampling.min_p > 0:
        lowest = sampling.min_p * shares.amax(dim=-1, keepdim=True)
        shares = shares.masked_fill(shares < lowest, 0)
    return shares, ids


def _drawn(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """The token at which the cumulative probability passes a number from [0, 1)."""
    shares, ids = probabilities(logits, sampling)
    cumulative = shares.cumsum(dim=-1)
    total = cumulative[:, -1:]
    wanted = torch.minimum(uniform.unsqueeze(-1) * total, total.nextafter(torch.zeros_like(total)))  # rounded up or not
    place = torch.searchsorted(cumulative, wanted, right=True).clamp(max=cumulative.shape[-1] - 1)  # of broken logits
    return (place if ids is None else ids.gather(-1, place)).squeeze(-1)


def _candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Logits that can be chosen, highest first, and their ids; None: all of them, in the order of their ids."""
    k = min(sampling.top_k, logits.shape[-1])
    if not k:
        if sampling.top_p == 1:
            return logits, None
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return values, ids
    values, ids = logits.topk(k, dim=-1)
    with_ties = int((logits >= values[:, -1:]).sum(dim=-1).amax())
    if with_ties > k:  # equal ones are in together, as transformers has it
        lowest = values[:, -1:]
        values, ids = logits.topk(with_ties, dim=-1)
        values = values.masked_fill(values < lowest, -math.inf)
    return values, ids
