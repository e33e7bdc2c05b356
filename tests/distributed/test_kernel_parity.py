"""A run with the C++ kernels is the run with plain torch: 200 steps on one curve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_med.config.schema import Config
from megatron_med.kernels import backend
from tests.ranks import run_ranks
from tests.training import MODELS, make_config, train_ranks

LOSS_BOUND = {"fp32": 2e-4, "bf16": 2e-2}
"""Of each of the 200 losses; half precisions and 200 updates magnify what is rounded otherwise."""


def _losses(config: Config) -> list[float]:
    backend.ask_for(config.kernels)
    return train_ranks(config)[0]


@pytest.mark.skipif("native" not in backend.serving("cpu"), reason="csrc/kernels is not built")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", MODELS)
def test_two_hundred_steps_lie_on_the_curve_of_plain_torch(sample_data: Path, family: str, precision: str) -> None:
    config = make_config(sample_data, MODELS[family], precision=precision, steps=200, micro_batch=8)
    config.lr_schedule.decay_steps = 200
    curves = {}
    for kernels in ("native", "reference"):
        config.kernels = kernels  # type: ignore[assignment]
        (curves[kernels],) = run_ranks(1, _losses, config)
    assert curves["native"] != curves["reference"], "both were computed by the same kernels"
    assert curves["reference"][-1] < curves["reference"][0] - 1
    np.testing.assert_allclose(curves["native"], curves["reference"], rtol=LOSS_BOUND[precision])
