"""One rank and every grid train alike: equal losses over 20 steps, equal gradients at the first."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.training import MODELS, Trained, gather, make_config, train_ranks

LOSS_BOUND = 1e-5
GRADIENT_BOUND = 1e-5
BF16_LOSS_BOUND = 5e-3

# (tp, pp, dp, sequence_parallel, sharding, schedule, layers_per_stage): every grid of up to 8 ranks, and every pair
# of options in some grid.
CASES: list[tuple[int, int, int, bool, str, str, list[int] | None]] = [
    (2, 1, 1, True, "optimizer", "1f1b", None),
    (2, 1, 1, False, "none", "gpipe", None),
    (1, 2, 1, True, "none", "1f1b", None),
    (1, 2, 1, False, "optimizer", "gpipe", [4, 1]),
    (1, 1, 2, True, "optimizer", "gpipe", None),
    (1, 1, 2, False, "none", "1f1b", None),
    (2, 2, 1, True, "none", "gpipe", [2, 3]),
    (2, 2, 1, False, "optimizer", "1f1b", None),
    (2, 1, 2, True, "none", "1f1b", None),
    (2, 1, 2, False, "none", "gpipe", None),
    (1, 2, 2, True, "none", "1f1b", None),
    (1, 2, 2, True, "optimizer", "gpipe", None),
    (2, 2, 2, True, "optimizer", "1f1b", None),
    (2, 2, 2, False, "optimizer", "gpipe", [1, 4]),
    (1, 4, 1, True, "optimizer", "1f1b", [2, 1, 1, 1]),
]


def _name(case: tuple[Any, ...]) -> str:
    tp, pp, dp, sequence, sharding, schedule, layers = case
    return f"tp{tp}-pp{pp}-dp{dp}-{'sp' if sequence else 'nosp'}-{sharding}-{schedule}-{layers or 'by cost'}"


@cache
def _single(prefix: Path, family: str, precision: str) -> Trained:
    config = make_config(prefix, MODELS[family], precision=precision, sharding="none")
    return gather(run_ranks(1, train_ranks, config))


def _grid(prefix: Path, family: str, case: tuple[Any, ...], precision: str = "fp32") -> Trained:
    tp, pp, dp, sequence, sharding, schedule, layers = case
    config = make_config(
        prefix,
        MODELS[family],
        precision=precision,
        tensor=tp,
        pipeline=pp,
        sequence_parallel=sequence,
        sharding=sharding,
        schedule=schedule,
        layers_per_stage=layers,
    )
    return gather(run_ranks(tp * pp * dp, train_ranks, config))


# Llama runs every case, GPT-2 every grid once: with tied embeddings, biases and learned positions.
GPT2_CASES = [CASES[index] for index in (0, 3, 4, 6, 9, 11, 12, 14)]
RUNS = [("llama", case) for case in CASES] + [("gpt2", case) for case in GPT2_CASES]


@pytest.mark.parametrize(("family", "case"), RUNS, ids=lambda value: value if isinstance(value, str) else _name(value))
def test_grid_trains_like_one_process(sample_data: Path, family: str, case: tuple[Any, ...]) -> None:
    alone, grid = _single(sample_data, family, "fp32"), _grid(sample_data, family, case)
    assert alone.losses[-1] < alone.losses[0] - 0.3, "the model does not learn: equal losses would prove nothing"
    np.testing.assert_allclose(grid.losses, alone.losses, rtol=LOSS_BOUND)
    np.testing.assert_allclose(grid.norms[0], alone.norms[0], rtol=1e-5)
    np.testing.assert_allclose(grid.norms, alone.norms, rtol=1e-3)  # a spike after the warm-up magnifies rounding
    assert grid.gradients.keys() == alone.gradients.keys()
    for name, expected in alone.gradients.items():
        _assert_gradient_equal(name, grid.gradients[name], expected, family)


def _assert_gradient_equal(name: str, actual: np.ndarray, expected: np.ndarray, family: str) -> None:
    if name.endswith("qkv.bias"):
        # Softmax ignores a constant added to all keys: the true gradient of a key bias is zero.
        heads = expected.reshape(4, 3, -1)
        assert np.abs(heads[:, 1]).max() < 1e-6
        assert np.abs(actual.reshape(4, 3, -1)[:, 1]).max() < 1e-6
        actual, expected = np.delete(actual.reshape(4, 3, -1), 1, 1), np.delete(heads, 1, 1)
    norm = np.linalg.norm(expected)
    assert norm > 0, f"{name} got no gradient"
    assert np.linalg.norm(actual - expected) / norm <= GRADIENT_BOUND, name


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[12]], ids=_name)
def test_bf16_grid_stays_near_one_bf16_process(sample_data: Path, case: tuple[Any, ...]) -> None:
    alone, grid = _single(sample_data, "llama", "bf16"), _grid(sample_data, "llama", case, "bf16")
    assert alone.losses[-1] < alone.losses[0] - 0.3
    np.testing.assert_allclose(grid.losses, alone.losses, rtol=BF16_LOSS_BOUND)


def _with_dropout(**changes: float) -> dict[str, Any]:
    return MODELS["gpt2"] | {"embedding_dropout": 0.1, "hidden_dropout": 0.1, "attention_dropout": 0.1} | changes


@pytest.mark.parametrize("grid", [{"pipeline": 2}, {"sharding": "optimizer"}], ids=["pp2", "dp2"])
def test_dropout_is_equal_under_pipeline_and_data_parallel(sample_data: Path, grid: dict[str, Any]) -> None:
    model = _with_dropout()
    alone = gather(run_ranks(1, train_ranks, make_config(sample_data, model, steps=5)))
    cut = gather(run_ranks(2, train_ranks, make_config(sample_data, model, steps=5, **grid)))
    np.testing.assert_allclose(cut.losses, alone.losses, rtol=LOSS_BOUND)
    without = gather(run_ranks(1, train_ranks, make_config(sample_data, MODELS["gpt2"], steps=5)))
    assert abs(without.losses[0] - alone.losses[0]) > 1e-4, "nothing was dropped"


def test_dropout_differs_where_tensor_parallel_ranks_hold_different_pieces(sample_data: Path) -> None:
    """Ranks agree on the loss and each cut region drops on its own: training goes on, with other masks than alone."""
    model = _with_dropout()
    alone = gather(run_ranks(1, train_ranks, make_config(sample_data, model, steps=4)))
    for sequence_parallel in (True, False):
        config = make_config(sample_data, model, steps=4, tensor=2, sequence_parallel=sequence_parallel)
        cut = gather(run_ranks(2, train_ranks, config))
        assert cut.losses != alone.losses
        np.testing.assert_allclose(cut.losses, alone.losses, rtol=2e-2)
