"""Decoupled weight decay, groups and the loss scale, against the published formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from megatron_med.config.presets import PRESETS
from megatron_med.config.schema import LoRAConfig, ModelConfig, OptimizerConfig, ParallelConfig, ParameterGroupConfig
from megatron_med.model.build import build_chunks
from megatron_med.model.lora import add_adapters
from megatron_med.optim.loss_scale import LossScaler
from megatron_med.optim.optimizer import Optimizer
from megatron_med.parallel.context import single_process_context
from megatron_med.parallel.data_parallel.buckets import BucketedDataParallel
from megatron_med.parallel.parameters import initialise, parameters_with_layout

LRS = [1e-3, 2e-3, 1.5e-3, 0.5e-3, 0.1e-3]
PEAK = 2e-3


def _optimizer(lora: LoRAConfig | None = None, **options: Any) -> tuple[nn.ModuleList, BucketedDataParallel, Optimizer]:
    context = single_process_context()
    model = ModelConfig(**PRESETS["gpt2-tiny"] | {"num_layers": 1, "hidden_size": 16, "vocab_size": 128})
    chunks = build_chunks(model, context, torch.float32, ParallelConfig())
    add_adapters(chunks, model, lora or LoRAConfig())
    initialise(chunks, context, seed=1)
    data_parallel = BucketedDataParallel(chunks, context, shard=False)
    config = OptimizerConfig(lr=PEAK, clip_grad=0.0, **options)
    return chunks, data_parallel, Optimizer(data_parallel, context, config)


def _gradient(name: str, step: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(name) * 100 + step)) * 0.1


def _expected(
    weight: torch.Tensor, name: str, decay_of: Callable[[float], float], lr_scale: float = 1.0
) -> torch.Tensor:
    """Adam (Kingma and Ba 2015) with bias correction; the weight is first multiplied by 1 - decay."""
    weight = weight.double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, lr in enumerate(LRS, start=1):
        gradient = _gradient(name, step, weight.shape).double()
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient.square()
        weight = weight * (1 - decay_of(lr * lr_scale))
        update = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        weight = weight - lr * lr_scale * update
    return weight


def _train(data_parallel: BucketedDataParallel, optimizer: Optimizer, scale: float = 1.0) -> None:
    for step, lr in enumerate(LRS, start=1):
        for item in data_parallel.owned:
            item.gradient.copy_(_gradient(item.layout.name, step, item.gradient.shape) * scale)
        optimizer.step(torch.tensor(1.0), lr, scale)


def _check(chunks: nn.ModuleList, before: dict[str, torch.Tensor], name: str, **formula: Any) -> None:
    after = {layout.name: parameter.detach() for layout, parameter in parameters_with_layout(chunks)}
    expected = _expected(before[name], name, **formula)
    torch.testing.assert_close(after[name].double(), expected, rtol=1e-5, atol=1e-6)
    moved = (expected - before[name].double()).norm()
    assert moved > 1e-4, "a weight that does not move proves nothing"


def _weights(chunks: nn.ModuleList) -> dict[str, torch.Tensor]:
    return {layout.name: parameter.detach().clone() for layout, parameter in parameters_with_layout(chunks)}


def test_adamw_decays_by_lr_times_weight_decay_and_norms_and_biases_not() -> None:
    chunks, data_parallel, optimizer = _optimizer(weight_decay=30.0)
    before = _weights(chunks)
    _train(data_parallel, optimizer)
    _check(chunks, before, "layers.0.mlp.up.weight", decay_of=lambda lr: 30.0 * lr)
    _check(chunks, before, "layers.0.mlp_norm.weight", decay_of=lambda lr: 0.0)
    _check(chunks, before, "layers.0.mlp.up.bias", decay_of=lambda lr: 0.0)


def test_decoupled_adamw_decays_by_weight_decay_times_lr_over_the_initial_lr() -> None:
    chunks, data_parallel, optimizer = _optimizer(name="decoupled_adamw", weight_decay=0.05)
    before = _weights(chunks)
    _train(data_parallel, optimizer)
    _check(chunks, before, "layers.0.mlp.up.weight", decay_of=lambda lr: 0.05 * lr / PEAK)
    _check(chunks, before, "layers.0.mlp_norm.weight", decay_of=lambda lr: 0.0)


def test_biomedlms_decay_is_0_1_in_adamws_terms() -> None:
    """1.6e-5 at a peak of 1.6e-4: MosaicML's 1 - 1.6e-5 lr / 1.6e-4 is AdamW's 1 - 0.1 lr."""
    lr = 1.6e-4
    results = []
    for options in ({"name": "decoupled_adamw", "weight_decay": 1.6e-5}, {"name": "adamw", "weight_decay": 0.1}):
        chunks, data_parallel, optimizer = _optimizer(**options)
        optimizer.initial_lr = lr
        _train(data_parallel, optimizer)
        results.append(_weights(chunks))
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=1e-6, atol=1e-8)


def test_groups_take_their_own_learning_rate_and_decay_and_the_first_match_counts() -> None:
    groups = [
        ParameterGroupConfig("embedding.*", lr_scale=0.5, weight_decay=0.0),
        ParameterGroupConfig("layers.*.attention.*.weight", lr_scale=2.0),
        ParameterGroupConfig("*.weight", lr_scale=1.0, weight_decay=5.0),
    ]
    chunks, data_parallel, optimizer = _optimizer(weight_decay=30.0, groups=groups)
    before = _weights(chunks)
    _train(data_parallel, optimizer)
    _check(chunks, before, "embedding.word.weight", decay_of=lambda lr: 0.0, lr_scale=0.5)
    _check(chunks, before, "layers.0.attention.qkv.weight", decay_of=lambda lr: 30.0 * lr, lr_scale=2.0)
    _check(chunks, before, "layers.0.mlp.up.weight", decay_of=lambda lr: 5.0 * lr)
    _check(chunks, before, "layers.0.mlp.up.bias", decay_of=lambda lr: 0.0)


def test_b_of_adapters_learns_faster_where_asked_and_weights_stay() -> None:
    chunks, data_parallel, optimizer = _optimizer(LoRAConfig(rank=2, lr_scale_b=16.0), weight_decay=30.0)
    before = _weights(chunks)
    _train(data_parallel, optimizer)
    adapter = "layers.0.attention.qkv.lora.c_attn"
    _check(chunks, before, f"{adapter}_A", decay_of=lambda lr: 30.0 * lr)
    _check(chunks, before, f"{adapter}_B", decay_of=lambda lr: 30.0 * lr, lr_scale=16.0)
    after = _weights(chunks)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [f"{adapter}_A", f"{adapter}_B"]


def test_fresh_moments_of_a_resumed_run_are_corrected_from_their_own_beginning() -> None:
    """Thawed after 100 updates: its first one is that of a first step, the learning rate long."""
    since = {"layers.0.mlp.up.weight": 100}
    chunks, data_parallel, optimizer = _optimizer(weight_decay=0.0)
    before = _weights(chunks)
    optimizer.resume(100, since)
    for item in data_parallel.owned:
        item.gradient.copy_(_gradient(item.layout.name, 1, item.gradient.shape))
    optimizer.step(torch.tensor(1.0), PEAK)
    after = _weights(chunks)
    moved = {name: (after[name] - before[name]).abs().median().item() for name in before}
    assert moved["layers.0.mlp.up.weight"] == pytest.approx(PEAK, rel=1e-3)
    assert moved["layers.0.mlp.down.weight"] < 0.5 * PEAK


def test_scaled_gradients_update_as_plain_ones() -> None:
    results = []
    for scale in (1.0, 1024.0):
        chunks, data_parallel, optimizer = _optimizer(weight_decay=1.0)
        _train(data_parallel, optimizer, scale)
        results.append(_weights(chunks))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=0, atol=0, msg=name)


def test_the_loss_scale_halves_on_overflow_and_doubles_after_a_window() -> None:
    scaler = LossScaler(OptimizerConfig(initial_loss_scale=16.0, loss_scale_window=3, min_loss_scale=2.0))
    scales = []
    for overflow in (True, False, False, True, False, False, False, True, True, True):
        scaler.update(overflow)
        scales.append(scaler.scale)
    assert scales == [8, 8, 8, 4, 4, 4, 8, 4, 2, 2]
    assert scaler.at_minimum
    scaler.update(overflow=False)
    again = LossScaler(OptimizerConfig())
    again.load_state_dict(scaler.state_dict())
    assert (again.scale, again.good_steps) == (2, 1)


@pytest.mark.parametrize("name", ["adamw", "decoupled_adamw"])
def test_the_state_is_there_before_the_first_step(name: str) -> None:
    _, data_parallel, optimizer = _optimizer(name=name)
    for item in data_parallel.owned:
        assert optimizer.states(item)["exp_avg"].shape == item.master.shape
    assert optimizer.steps == 0
    _train(data_parallel, optimizer)
    assert optimizer.steps == len(LRS)
