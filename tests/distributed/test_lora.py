"""LoRA like PEFT's and like an unsharded run: from one adapter with a B that is not zero, under every grid."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_med.checkpoint.folder import CheckpointState, step_folder
from megatron_med.checkpoint.huggingface.convert import export_huggingface
from megatron_med.checkpoint.huggingface.peft import AdapterTensor, adapter_tensors, import_adapter
from megatron_med.checkpoint.save import save_checkpoint
from megatron_med.config.schema import Config, LoRAConfig
from megatron_med.model.build import build_stage
from megatron_med.model.lora import add_adapters
from megatron_med.parallel.context import single_process_context
from megatron_med.parallel.parameters import initialise, parameters_with_layout
from megatron_med.plan.cluster import KINDS, Cluster
from megatron_med.plan.predict import plan
from megatron_med.train.loading import find_source, load_state
from tests.ranks import run_ranks
from tests.training import (
    MEMORY_GRIDS,
    MODELS,
    gather,
    make_config,
    measured_peak,
    memory_config,
    set_up,
    train_from_here,
)

ALL = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
RANK, ALPHA, LR = 4, 12.0, 1e-3
NEW_ROWS = [236, 276]
"""Tokens that pass for added ones; with two tensor-parallel ranks each holds some of them."""

GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"sharding": "none"}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2, no sequence parallelism": (2, {"tensor": 2, "sequence_parallel": False}),
    "pipeline 2": (2, {"pipeline": 2}),
    "data 2": (2, {"sharding": "optimizer"}),
    "all eight": (8, {"tensor": 2, "pipeline": 2}),
    "full sharding": (2, {"sharding": "full"}),
    "full sharding, all eight": (8, {"tensor": 2, "pipeline": 2, "sharding": "full"}),
    "interleaved": (4, {"tensor": 2, "pipeline": 2, "virtual_stages": 2, "schedule": "interleaved"}),
    "zero bubble": (2, {"pipeline": 2, "schedule": "zero_bubble"}),
}


def _config(prefix: Path, family: str, parallel: dict[str, Any], load: Path | None) -> Config:
    config = make_config(prefix, MODELS[family], **parallel)
    config.optimizer.lr = LR
    config.lr_schedule.warmup_steps = 0
    config.lr_schedule.name = "constant"
    config.optimizer.weight_decay = 0.0
    if load is not None:
        config.lora = LoRAConfig(rank=RANK, alpha=ALPHA, targets=ALL[family])
        config.checkpoint.load = str(load)
    return config


def _save_base(config: Config, folder: Path) -> list[np.ndarray]:
    """Saves initial weights as a checkpoint and as a Hugging Face folder; every batch of the run."""
    train_module, loader = set_up(config)
    state = CheckpointState(model=asdict(config.model), optimizer_steps=0, new_rows=NEW_ROWS, run={"precision": "fp32"})
    save_checkpoint(step_folder(folder, 0), train_module.optimizer, train_module.context, state=state)
    export_huggingface(folder, folder.parent / "hf")
    size = config.train.global_batch_size
    batches = []
    for step in range(1, config.train.steps + 1):
        micro_batches = loader.load((step - 1) * size, size, step)
        batches.append(torch.cat([torch.cat([b.tokens, b.labels[:, -1:]], dim=1) for b in micro_batches]).numpy())
    return batches


def _train_peft(
    folder: Path,
    family: str,
    batches: list[np.ndarray],
    rows: slice | None = None,
    start: dict[str, torch.Tensor] | None = None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Writes an adapter with a B that is not zero (or ``start``), then trains it with PEFT and torch alone; with
    ``rows`` also those of embedding and head."""
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=ALL[family], fan_in_fan_out=family == "gpt2"
    )
    adapted = peft.get_peft_model(model, settings).train()
    generator = torch.Generator().manual_seed(5)
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            if start is not None:
                parameter.copy_(start[name.replace(".default", "")])
            else:
                parameter.normal_(std=0.1, generator=generator)
    adapted.save_pretrained(folder / "peft")
    if rows is not None:
        trained |= _with_rows(adapted, rows)
    adamw = torch.optim.AdamW(trained.values(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses, first = [], {}
    for batch in batches:
        ids = torch.from_numpy(batch)
        logits = adapted(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        first = first or {n.replace(".default", ""): p.grad.clone() for n, p in trained.items() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        adamw.step()
        losses.append(loss.item())
    return losses, first


def _with_rows(model: torch.nn.Module, rows: slice) -> dict[str, torch.Tensor]:
    """Embedding and head, whose gradients are zero but in these rows."""
    ends = ("embed_tokens.weight", "lm_head.weight", "wte.weight")
    found = {name: parameter for name, parameter in model.named_parameters() if name.endswith(ends)}
    for parameter in found.values():
        mask = torch.zeros_like(parameter[:, :1])
        mask[rows] = 1
        parameter.requires_grad_()
        parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
    return found


def _initial_adapter(config: Config) -> dict[str, torch.Tensor]:
    """What a new run begins with, by PEFT's names."""
    stage = build_stage(config.model, single_process_context(), torch.float32)
    add_adapters([stage], config.model, config.lora)
    initialise(stage, single_process_context(), config.train.seed)
    drawn = {layout.name: parameter.detach() for layout, parameter in parameters_with_layout(stage)}
    return {one.name: one.to_peft(drawn[one.layout.name]) for one in adapter_tensors(config.model, config.lora)}


def train_adapter(config: Config) -> tuple[list[float], list[float], list[Any]]:
    """As ``tests.training.train_ranks``, from the adapter that ``checkpoint.load`` names."""
    train_module, loader = set_up(config, range(*NEW_ROWS) if config.lora.train_rows else None)
    trained = {item.layout.name for item in train_module.optimizer.owned}
    load_state(config, find_source(config, None), train_module, None, trained, set())
    return train_from_here(config, train_module, loader)


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest, sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family, folder with base and adapter, and PEFT's losses and first gradients."""
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    config = _config(sample_data, family, {"sharding": "none"}, None)
    (batches,) = run_ranks(1, _save_base, config, folder / "base")
    losses, gradients = _train_peft(folder, family, batches)
    import_adapter(folder / "peft", folder / "adapter", folder / "base")
    return family, folder, losses, gradients


FAMILIES_ON_GRIDS = [*(("llama", grid) for grid in GRIDS), ("gpt2", "one process"), ("gpt2", "all eight")]
"""What a grid does to adapters does not depend on the family, but for how its matrices are cut into parts."""


@pytest.mark.parametrize(("reference", "grid"), FAMILIES_ON_GRIDS, indirect=["reference"])
def test_twenty_steps_equal_peft(reference: Any, sample_data: Path, grid: str) -> None:
    family, folder, losses, gradients = reference
    ranks, parallel = GRIDS[grid]
    config = _config(sample_data, family, parallel, folder / "adapter")
    ours = gather(run_ranks(ranks, train_adapter, config))
    known = adapter_tensors(config.model, config.lora)
    assert {one.name for one in known} == gradients.keys()
    assert ours.gradients.keys() == {one.layout.name for one in known}
    for one in known:
        _same(one, ours.gradients[one.layout.name], gradients[one.name])
    assert losses[-1] < losses[0] - 0.02
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-5)


def _same(one: AdapterTensor, mine: np.ndarray, theirs: torch.Tensor) -> None:
    difference = (one.to_peft(torch.from_numpy(mine)) - theirs).abs().max()
    assert difference <= 1e-5 * theirs.abs().max(), one.name


@pytest.mark.parametrize(
    ("reference", "grid"),
    [
        ("gpt2", "tensor 2, no sequence parallelism"),
        ("llama", "pipeline 2"),
        ("gpt2", "data 2"),
        ("llama", "full sharding"),
    ],
    indirect=["reference"],
)
def test_masks_are_those_of_one_process_where_ranks_hold_the_same_input(
    reference: Any, sample_data: Path, grid: str
) -> None:
    family, folder, _, _ = reference
    curves = []
    for name in ("one process", grid):
        ranks, parallel = GRIDS[name]
        config = _config(sample_data, family, parallel, folder / "base")
        config.train.steps, config.train.micro_batch_size = 5, 1  # masks are seeded by micro-batch
        config.lora.targets = ["q_proj", "v_proj", "up_proj"] if family == "llama" else ["c_attn", "c_fc"]
        config.lora.dropout = 0.3
        config.optimizer.lr = 2e-2
        curves.append(gather(run_ranks(ranks, train_adapter, config)).losses)
    np.testing.assert_allclose(*curves, rtol=1e-5)
    assert curves[0][-1] < curves[0][0]


ROW_GRIDS = {
    "llama": ["tensor 2, no sequence parallelism", "full sharding"],
    "gpt2": ["one process", "pipeline 2"],
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_of_added_tokens_are_trained_like_rows_of_whole_matrices(
    sample_data: Path, tmp_path: Path, family: str
) -> None:
    """GPT-2's rows serve embedding and head at once."""
    config = _config(sample_data, family, {"sharding": "none"}, None)
    (batches,) = run_ranks(1, _save_base, config, tmp_path / "base")
    rows = slice(*NEW_ROWS)
    assert sum(np.isin(batch, np.arange(*NEW_ROWS)).sum() for batch in batches) > 100
    start = _initial_adapter(_config(sample_data, family, {}, tmp_path / "base"))
    losses, _ = _train_peft(tmp_path, family, batches, rows, start)
    without, _ = _train_peft(tmp_path, family, batches, None, start)
    assert abs(losses[-1] - without[-1]) > 1e-3
    for grid in ROW_GRIDS[family]:
        ranks, parallel = GRIDS[grid]
        config = _config(sample_data, family, parallel, tmp_path / "base")
        config.lora.train_rows = "new"
        ours = gather(run_ranks(ranks, train_adapter, config))
        np.testing.assert_allclose(ours.losses, losses, rtol=1e-5, err_msg=grid)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", MEMORY_GRIDS)
def test_planned_and_measured_memory(sample_data: Path, name: str, family: str) -> None:
    ranks, _ = MEMORY_GRIDS[name]
    config = memory_config(sample_data, name, family)
    everything = plan(config, Cluster(KINDS["a100-80g"], 1, ranks), device="cpu")
    config.lora = LoRAConfig(rank=RANK, alpha=ALPHA, targets=ALL[family], dropout=0.1)
    config.checkpoint.load = "base"
    planned = plan(config, Cluster(KINDS["a100-80g"], 1, ranks), device="cpu")
    for rank, peak in enumerate(run_ranks(ranks, measured_peak, config)):
        memory = planned.stages[rank * len(planned.stages) // ranks].memory
        whole = everything.stages[rank * len(planned.stages) // ranks].memory
        assert memory.optimizer < 0.2 * whole.optimizer
        assert memory.total == pytest.approx(peak, rel=0.05), f"rank {rank}"
