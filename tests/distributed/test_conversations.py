"""Packed and padded conversations give the gradients of one conversation at a time, on every grid."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_med.config.schema import Config
from megatron_med.data.instruct import ConversationStream
from megatron_med.model.batch import MicroBatch, plain_batch
from megatron_med.train.step import compute_gradients
from megatron_med.train.timers import StepTimer
from tests.ranks import run_ranks
from tests.training import MODELS, _gradient_shard, gather, make_config, set_up

BATCH = 8


def _config(prefix: Path, family: str, data: dict[str, Any], **parallel: Any) -> Config:
    config = make_config(prefix, MODELS[family], batch=BATCH, **parallel)
    config.data.sequence_length = 64
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def _first_gradients(config: Config) -> tuple[list[float], list[float], list[Any]]:
    train_module, loader = set_up(config)
    compute_gradients(train_module, loader.load(0, BATCH, 1), StepTimer(torch.device("cpu")))
    shards = [_gradient_shard(train_module, item) for item in train_module.optimizer.owned]
    return [], [], shards


def _one_at_a_time(config: Config) -> tuple[list[float], list[float], list[Any]]:
    """The same conversations, each a micro-batch of its own, without padding."""
    train_module, loader = set_up(config)
    stream: ConversationStream = loader.dataset.epochs  # type: ignore[attr-defined]
    batches = []
    for index in range(BATCH):
        for which, number in stream.parts(index):
            batches.append(_alone(stream, which, number, config))
    compute_gradients(train_module, batches, StepTimer(torch.device("cpu")))
    return [], [], [_gradient_shard(train_module, item) for item in train_module.optimizer.owned]


def _alone(stream: ConversationStream, which: int, number: int, config: Config) -> MicroBatch:
    found = stream._sets[which]
    ids = torch.from_numpy(found.data.read(number).astype(np.int64))[None]
    trained = torch.from_numpy(found.roles.read(number)[1:] == 1).float()[None]
    if config.data.loss_average == "conversation":
        trained = trained / trained.sum()
    plain = plain_batch(ids[:, :-1], ids[:, 1:])
    return MicroBatch(plain.tokens, plain.labels, trained, plain.positions, plain.dropout_key)


@cache
def _expected(prefix: Path, family: str, average: str, packing: bool) -> dict[str, np.ndarray]:
    config = _config(prefix, family, {"loss_average": average, "packing": packing})
    return gather(run_ranks(1, _one_at_a_time, config)).gradients


GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tensor 2 x interleaved pipeline 2": (
        4,
        {"tensor": 2, "pipeline": 2, "virtual_stages": 2, "schedule": "interleaved"},
    ),
    "tensor 2 x pipeline 2 x data 2": (8, {"tensor": 2, "pipeline": 2}),
    "full sharding": (2, {"sharding": "full"}),
}


@pytest.mark.parametrize("average", ["token", "conversation"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_are_those_of_one_conversation_at_a_time(
    conversation_data: Path, grid: str, packing: bool, average: str
) -> None:
    ranks, parallel = GRIDS[grid]
    config = _config(conversation_data, "llama", {"loss_average": average, "packing": packing}, **parallel)
    _assert_equal(ranks, config, _expected(conversation_data, "llama", average, packing))


def test_learned_positions_restart_too(conversation_data: Path) -> None:
    config = _config(conversation_data, "gpt2", {}, tensor=2, pipeline=2)
    _assert_equal(4, config, _expected(conversation_data, "gpt2", "token", True))


def _assert_equal(ranks: int, config: Config, expected: dict[str, np.ndarray]) -> None:
    found = gather(run_ranks(ranks, _first_gradients, config)).gradients
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found[name], gradient, rtol=1e-5, atol=1e-5 * scale, err_msg=name)
