"""One process and every grid train alike: equal losses over many steps, equal gradients at the first."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_med.config.schema import Config
from megatron_med.parallel.random import DropoutRegion
from megatron_med.train.step import validation_loss
from tests.distributed.combinations import TABLE, Combination, possible
from tests.ranks import run_ranks
from tests.training import MODELS, STEPS, Trained, gather, make_config, one_step, set_up, train_ranks

LOSS_BOUND = 1e-5
GRADIENT_BOUND = 1e-5
HALF_BOUNDS = {"bf16": (5e-3, 3e-2), "fp16": (1e-3, 5e-3)}
"""Of losses over 10 steps and of gradients at the first: 8 and 11 bits of mantissa, summed in another order."""
FEWER_STEPS = 10

HALF = [TABLE[row] for row in (2, 4, 5, 6, 7)]
"""Rows that hold every value of every option, for the half precisions and for more steps."""


def test_the_table_covers_every_pair_that_can_run() -> None:
    wanted = {pair for row in possible() for pair in row.pairs()}
    covered = {pair for row in TABLE for pair in row.pairs()}
    assert len(wanted) > 380
    assert not wanted - covered
    assert all(row.can_run() for row in TABLE)
    values = {(place, value) for pair in wanted for place, value in pair}
    assert {(place, value) for row in HALF for pair in row.pairs() for place, value in pair} == values


@cache
def _alone(prefix: Path, family: str, isolate_documents: bool, precision: str) -> Trained:
    row = Combination(1, 1, 1, 1, "none", "1f1b", "none", False, "by_cost", family, isolate_documents, False)
    return gather(run_ranks(1, train_ranks, row.config(prefix, precision)))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_combination_trains_like_one_process(
    sentence_data: Path, row: Combination, pytestconfig: pytest.Config
) -> None:
    """Over 10 steps; with ``--all`` rows that hold every value of every option over 20."""
    alone = _alone(sentence_data, row.family, row.isolate_documents, "fp32")
    config = row.config(sentence_data)
    config.train.steps = STEPS if row in HALF and pytestconfig.getoption("--all") else FEWER_STEPS
    grid = gather(run_ranks(row.ranks, train_ranks, config))
    assert alone.losses[-1] < alone.losses[0] - 0.3, "the model does not learn: equal losses would prove nothing"
    np.testing.assert_allclose(grid.losses, alone.losses[: config.train.steps], rtol=LOSS_BOUND)
    np.testing.assert_allclose(grid.norms[0], alone.norms[0], rtol=1e-5)
    # a spike after the warm-up magnifies rounding
    np.testing.assert_allclose(grid.norms, alone.norms[: config.train.steps], rtol=1e-3)
    _assert_gradients_equal(grid, alone, GRADIENT_BOUND)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("row", HALF, ids=lambda row: row.name)
def test_a_half_precision_combination_stays_near_one_process(
    sentence_data: Path, row: Combination, precision: str
) -> None:
    loss_bound, gradient_bound = HALF_BOUNDS[precision]
    alone = _alone(sentence_data, row.family, row.isolate_documents, precision)
    config = row.config(sentence_data, precision)
    config.train.steps = FEWER_STEPS
    grid = gather(run_ranks(row.ranks, train_ranks, config))
    np.testing.assert_allclose(grid.losses, alone.losses[:FEWER_STEPS], rtol=loss_bound)
    _assert_gradients_equal(grid, alone, gradient_bound)


def _losses_by_micro_batches(config: Config, counts: list[int]) -> list[float]:
    """One step's loss for several numbers of micro-batches."""
    train_module, loader = set_up(config)
    losses = []
    for count in counts:
        train_module.data_parallel.finish_param_sync()
        losses.append(one_step(train_module, loader, 1, size=count).loss)
    return losses


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
def test_any_number_of_micro_batches_runs(sentence_data: Path, schedule: str) -> None:
    """Fewer than stages, odd ones, and groups of unequal length."""
    counts = [1, 2, 5, 7]
    model = MODELS["llama"] | {"num_layers": 6}
    (alone,) = run_ranks(1, _losses_by_micro_batches, make_config(sentence_data, model), counts)
    virtual = 2 if schedule == "interleaved" else 1
    config = make_config(sentence_data, model, pipeline=3, schedule=schedule, virtual_stages=virtual)
    for losses in run_ranks(3, _losses_by_micro_batches, config, counts):
        np.testing.assert_allclose(losses, alone, rtol=LOSS_BOUND)


def test_gpipe_runs_several_chunks_a_stage(sentence_data: Path) -> None:
    row = Combination(1, 2, 1, 1, "optimizer", "gpipe", "none", False, "by_cost", "llama", False, True)
    config = row.config(sentence_data)
    config.parallel.virtual_stages = 2
    _assert_gradients_equal(
        gather(run_ranks(2, train_ranks, config)), _alone(sentence_data, "llama", False, "fp32"), GRADIENT_BOUND
    )


def _assert_gradients_equal(grid: Trained, alone: Trained, bound: float) -> None:
    assert grid.gradients.keys() == alone.gradients.keys()
    for name, expected in alone.gradients.items():
        actual = grid.gradients[name]
        if name.endswith("qkv.bias"):
            # Softmax ignores a constant added to all keys: the true gradient of a key bias is zero.
            actual, expected = (np.delete(bias.reshape(4, 3, -1), 1, 1) for bias in (actual, expected))
        norm = np.linalg.norm(expected)
        assert norm > 0, f"{name} got no gradient"
        assert np.linalg.norm(actual - expected) / norm <= bound, name


def _validate_between_steps(config: Config) -> list[float]:
    """Validation loss, training loss, validation loss, ... over two steps; then once with weights set by hand."""
    train_module, loader = set_up(config)
    held_out = loader.load(80, 13, 0)  # a last micro-batch that is not full
    losses = [validation_loss(train_module, held_out)]
    for step in (1, 2):
        losses.append(one_step(train_module, loader, step, lr=4e-3).loss)
        losses.append(validation_loss(train_module, held_out))
    for item in train_module.optimizer.owned:
        item.master.mul_(0.5)
    train_module.data_parallel.start_param_sync()
    losses.append(validation_loss(train_module, held_out))
    return losses


@pytest.mark.parametrize(
    "grid",
    [
        {"sharding": "full"},
        {"sharding": "full", "pipeline": 2},
        {"sharding": "optimizer"},
        {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2},
        {"pipeline": 2, "schedule": "zero_bubble"},
    ],
    ids=str,
)
def test_validation_between_steps_sees_the_new_weights_and_changes_nothing(
    sample_data: Path, grid: dict[str, Any]
) -> None:
    (alone,) = run_ranks(1, _validate_between_steps, make_config(sample_data, MODELS["llama"]))
    for losses in run_ranks(4, _validate_between_steps, make_config(sample_data, MODELS["llama"], **grid)):
        np.testing.assert_allclose(losses, alone, rtol=LOSS_BOUND)
    assert len(set(alone)) == len(alone)


def _with_dropout(**changes: float) -> dict[str, Any]:
    return MODELS["gpt2"] | {"embedding_dropout": 0.1, "hidden_dropout": 0.1, "attention_dropout": 0.1} | changes


@cache
def _alone_with_dropout(prefix: Path) -> Trained:
    return gather(run_ranks(1, train_ranks, make_config(prefix, _with_dropout(), steps=5)))


@pytest.mark.parametrize(
    "grid",
    [
        {"pipeline": 2},
        {"sharding": "optimizer"},
        {"sharding": "full"},
        {"pipeline": 2, "schedule": "zero_bubble"},
        {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2},
    ],
    ids=str,
)
def test_dropout_is_equal_under_pipeline_and_data_parallel(sample_data: Path, grid: dict[str, Any]) -> None:
    alone = _alone_with_dropout(sample_data)
    cut = gather(run_ranks(2, train_ranks, make_config(sample_data, _with_dropout(), steps=5, **grid)))
    np.testing.assert_allclose(cut.losses, alone.losses, rtol=LOSS_BOUND)
    without = gather(run_ranks(1, train_ranks, make_config(sample_data, MODELS["gpt2"], steps=5)))
    assert abs(without.losses[0] - alone.losses[0]) > 1e-4, "nothing was dropped"


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("grid", [{}, {"tensor": 2}], ids=["alone", "tp2"])
def test_dropout_is_reproduced_in_recompute(sample_data: Path, mode: str, grid: dict[str, int]) -> None:
    """Bitwise: the same masks, the same sums. Attention dropout takes the kernel that keeps its probabilities."""
    config = make_config(sample_data, _with_dropout(), steps=3, micro_batch=2, **grid)
    kept = gather(run_ranks(grid.get("tensor", 1), train_ranks, config))
    config.recompute = mode  # type: ignore[assignment]
    again = gather(run_ranks(grid.get("tensor", 1), train_ranks, config))
    assert again.losses == kept.losses
    for name, gradient in kept.gradients.items():
        np.testing.assert_array_equal(again.gradients[name], gradient, err_msg=name)


def _drop_patterns(config: Config) -> dict[str, list[int]]:
    """The seeds with which each region of a tensor-parallel rank drew its masks in one step."""
    train_module, loader = set_up(config)
    seeds: dict[str, list[int]] = {}
    seed = DropoutRegion.seed

    def noted(region: DropoutRegion, key: str) -> int:
        drawn = seed(region, key)
        seeds.setdefault(region.name, []).append(drawn)
        return drawn

    DropoutRegion.seed = noted  # type: ignore[method-assign]
    one_step(train_module, loader, 1, size=2)
    return seeds


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_dropout_is_equal_over_tensor_parallel_where_it_must_be_and_differs_where_it_must(
    sample_data: Path, sequence_parallel: bool
) -> None:
    """Heads are cut: their masks differ. The residual stream is cut under sequence parallelism only."""
    grid = {"tensor": 2, "sequence_parallel": sequence_parallel}
    config = make_config(sample_data, _with_dropout(), batch=2, micro_batch=1, **grid)
    first, second = run_ranks(2, _drop_patterns, config)
    assert first.keys() == second.keys()
    assert len(first) == 3 * 5 + 1
    for region, seeds in first.items():
        assert len(set(seeds)) == 2, "two micro-batches, two masks"
        is_sharded = sequence_parallel or region.endswith("probabilities")
        assert (set(seeds).isdisjoint(second[region])) if is_sharded else (seeds == second[region]), region


def test_dropout_differs_where_tensor_parallel_ranks_hold_different_pieces(sample_data: Path) -> None:
    """Ranks agree on the loss and each cut region drops on its own: training goes on, with other masks than alone."""
    alone = _alone_with_dropout(sample_data)
    for sequence_parallel in (True, False):
        config = make_config(
            sample_data, _with_dropout(), steps=4, micro_batch=1, tensor=2, sequence_parallel=sequence_parallel
        )
        cut = gather(run_ranks(2, train_ranks, config))
        assert cut.losses[:4] != alone.losses[:4]
        np.testing.assert_allclose(cut.losses, alone.losses[:4], rtol=2e-2)
