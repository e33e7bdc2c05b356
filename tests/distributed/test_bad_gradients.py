"""One gradient that is not finite, on one rank of a grid: the step is skipped everywhere, and the parameter named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_med.config.schema import Config
from megatron_med.train.loop import _first_bad_gradient
from megatron_med.train.setup import Run
from tests.ranks import run_ranks
from tests.training import MODELS, make_config, one_step, set_up

NAME = "layers.3.mlp.down.weight"
BAD_RANK = 3


def _train(config: Config, value: float) -> tuple[list[bool], bool, str, list[float]]:
    """Three steps; the second meets one bad number on one rank after its reduction."""
    train_module, loader = set_up(config)
    finish = train_module.data_parallel.finalize_grads
    steps = 0

    def poisoned() -> None:
        finish()
        for item in train_module.data_parallel.owned:
            if steps == 2 and item.layout.name == NAME and train_module.context.world.rank == BAD_RANK:
                item.gradient.view(-1)[5] = value

    train_module.data_parallel.finalize_grads = poisoned  # type: ignore[method-assign]
    skipped, losses, name, unchanged = [], [], "", True
    for steps in (1, 2, 3):
        before = [item.master.clone() for item in train_module.optimizer.owned]
        result = one_step(train_module, loader, steps, lr=1e-2)
        same = all(torch.equal(a, item.master) for a, item in zip(before, train_module.optimizer.owned, strict=True))
        skipped.append(result.skipped)
        losses.append(result.loss)
        if steps == 2:
            unchanged = same
            run = SimpleNamespace(train_module=train_module, context=train_module.context)
            name = _first_bad_gradient(cast(Run, run))
        else:
            assert not same
    assert train_module.optimizer.steps == 2, "a skipped step is no update"
    return skipped, unchanged, name, losses


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "parallel", [{"tensor": 2, "pipeline": 2}, {"pipeline": 2, "sharding": "full"}], ids=["tp2-pp2", "full-pp2-dp2"]
)
def test_the_step_is_skipped_on_every_rank_and_the_parameter_named(
    sample_data: Path, parallel: dict[str, Any], value: float
) -> None:
    results = run_ranks(4, _train, make_config(sample_data, MODELS["llama"], **parallel), value)
    for skipped, unchanged, name, losses in results:
        assert skipped == [False, True, False]
        assert unchanged, "nothing may move in a skipped step"
        assert name == f"the first is of {NAME} (rank {BAD_RANK})"
        assert losses == results[0][3]
