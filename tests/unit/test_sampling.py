"""Choosing tokens from logits, against the processors of transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_med.errors import ConfigError
from megatron_med.inference.sampling import NOT_FINITE, History, Sampling, choose, penalise, probabilities

NOTHING = History([], [])


def _generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + row) for row in range(count)]


def _choose(logits: Tensor, sampling: Sampling, seed: int = 0) -> list[int]:
    rows = len(logits)
    return choose(logits.clone(), sampling, [NOTHING] * rows, _generators(rows, seed)).tolist()


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-3])
def test_a_temperature_near_zero_takes_the_most_likely_token(temperature: float) -> None:
    logits = torch.tensor([[1.0, 5.0, 4.0], [300.0, -300.0, 0.0]])
    assert _choose(logits, Sampling(temperature)) == [1, 0]


def test_shares_follow_the_temperature() -> None:
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1]])).expand(20_000, 3)
    drawn = torch.tensor(_choose(logits, Sampling(0.5), seed=2))
    expected = torch.tensor([0.49, 0.04, 0.01]) / 0.54
    torch.testing.assert_close(drawn.bincount(minlength=3) / 20_000, expected, atol=0.01, rtol=0)


FILTERS = {
    "temperature": Sampling(0.7),
    "top-k": Sampling(1.3, top_k=5),
    "top-k-of-all": Sampling(1.0, top_k=1000),
    "top-p": Sampling(0.9, top_p=0.8),
    "top-p-small": Sampling(0.9, top_p=1e-4),
    "min-p": Sampling(1.5, min_p=0.1),
    "medalpaca": Sampling(0.4, top_k=50, top_p=0.9),
    "all": Sampling(0.8, top_k=40, top_p=0.7, min_p=0.05),
}


@pytest.mark.parametrize("sampling", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("ties", [False, True])
def test_filters_leave_what_those_of_transformers_leave(sampling: Sampling, ties: bool) -> None:
    logits = torch.randn(6, 97, generator=torch.Generator().manual_seed(3)) * 3
    if ties:  # as bf16 has them
        logits = logits.round()
    theirs = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        theirs.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        theirs.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        theirs.append(MinPLogitsWarper(sampling.min_p))
    expected = theirs(torch.zeros(6, 1, dtype=torch.long), logits.double()).softmax(-1)
    shares, ids = probabilities(logits, sampling)
    ours = shares if ids is None else torch.zeros(6, 97, dtype=torch.double).scatter(-1, ids, shares)
    if ties and sampling.top_p < 1:  # which of equal tokens stays is nobody's rule: compare the probabilities
        ours, expected = ours.sort().values, expected.sort().values
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), expected, atol=1e-12, rtol=1e-9)


def test_what_is_drawn_has_these_shares() -> None:
    sampling = FILTERS["all"]
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(5)) * 2
    shares, ids = probabilities(logits, sampling)
    assert ids is not None
    expected = torch.zeros(50, dtype=torch.double).scatter(0, ids[0], shares[0] / shares.sum())
    drawn = torch.tensor(_choose(logits.expand(20_000, 50), sampling, seed=11)).bincount(minlength=50) / 20_000
    assert not drawn[expected == 0].any(), "a token that is filtered out is never drawn"
    torch.testing.assert_close(drawn.double(), expected, atol=0.015, rtol=0)


def test_what_a_row_draws_depends_on_its_own_generator_alone() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(7))
    sampling = Sampling(1.0, top_p=0.9)
    together = _choose(logits, sampling)
    alone = [choose(logits[row : row + 1].clone(), sampling, [NOTHING], _generators(1, row)).item() for row in range(5)]
    assert together == alone


def test_penalties_are_those_of_transformers_row_by_row() -> None:
    generator = torch.Generator().manual_seed(9)
    scores = torch.randn(4, 20, generator=generator) * 4
    lengths = [3, 8, 1, 6]
    texts = [torch.randint(20, (length,), generator=generator).tolist() for length in lengths]
    histories = [History(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    ours = scores.clone()
    penalise(ours, Sampling(repetition_penalty=1.4), histories)
    for row, text in enumerate(texts):
        expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([text]), scores[row : row + 1].clone())
        torch.testing.assert_close(ours[row : row + 1], expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_repeated_n_grams_are_banned_as_in_transformers(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    texts = [torch.randint(4, (length,), generator=generator).tolist() for length in (1, 2, 5, 30)]
    for text in texts:
        ours = torch.zeros(1, 4)
        penalise(ours, Sampling(no_repeat_ngram_size=size), [History(text[:1], text[1:])])
        expected = NoRepeatNGramLogitsProcessor(size)(torch.tensor([text]), torch.zeros(1, 4))
        assert torch.equal(ours, expected), text


def test_the_frequency_penalty_counts_the_answer_alone() -> None:
    scores = torch.zeros(2, 5)
    penalise(scores, Sampling(frequency_penalty=0.5), [History([1, 1], [2, 2, 3]), History([4], [])])
    assert scores.tolist() == [[0, 0, -1.0, -0.5, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.5)])
def test_broken_logits_choose_nothing(broken: float, sampling: Sampling) -> None:
    logits = torch.zeros(2, 6)
    logits[1, 3] = broken
    chosen = _choose(logits, sampling)
    assert chosen[0] != NOT_FINITE
    assert chosen[1] == NOT_FINITE


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1.0, "temperature is -1.0"),
        ("temperature", float("nan"), "temperature is nan"),
        ("min_p", 1.5, "min-p is 1.5"),
        ("repetition_penalty", 0.0, "repetition-penalty is 0.0"),
        ("frequency_penalty", float("inf"), "frequency-penalty is inf"),
        ("no_repeat_ngram_size", -1, "no-repeat-ngram-size is -1"),
        ("beams", 0, "beams is 0"),
        ("top_k", 5, "with temperature 0"),
        ("min_p", 0.5, "with temperature 0"),
        ("length_penalty", 2.0, "without beams"),
    ],
)
def test_settings_that_make_no_sense_are_told(field: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(Sampling(), **{field: value})
    with pytest.raises(ConfigError, match="leave out temperature"):
        Sampling(temperature=0.5, beams=3)
