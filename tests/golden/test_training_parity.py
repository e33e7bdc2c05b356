"""The same weights and batches in plain transformers with torch's AdamW: equal losses and gradient norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_med.checkpoint.folder import CheckpointState, step_folder
from megatron_med.checkpoint.huggingface.convert import export_huggingface
from megatron_med.checkpoint.save import save_checkpoint
from megatron_med.config.schema import Config
from megatron_med.optim.lr_schedule import learning_rate
from tests.ranks import run_ranks
from tests.training import MODELS, make_config, one_step, set_up

TOLERANCE = 1e-4


def _ours(config: Config, folder: Path) -> dict[str, Any]:
    """Saves the initial weights as a Hugging Face folder, then trains and keeps every batch."""
    from dataclasses import asdict

    train_module, loader = set_up(config)
    context = train_module.context
    state = CheckpointState(model=asdict(config.model), optimizer_steps=0, run={"precision": "fp32"})
    save_checkpoint(step_folder(folder, 0), train_module.optimizer, context, state=state)
    export_huggingface(folder, folder / "hf")
    size = config.train.global_batch_size
    losses, norms, rates, batches = [], [], [], []
    for step in range(1, config.train.steps + 1):
        lr = learning_rate(config.lr_schedule, config.optimizer.lr, step, config.train.steps)
        micro_batches = loader.load((step - 1) * size, size, step)
        result = one_step(train_module, loader, step, size, lr)
        losses.append(result.loss)
        norms.append(result.gradient_norm)
        rates.append(lr)
        batches.append(torch.cat([torch.cat([b.tokens, b.labels[:, -1:]], dim=1) for b in micro_batches]).numpy())
    return {"losses": losses, "norms": norms, "rates": rates, "batches": batches}


def _theirs(
    config: Config, folder: Path, rates: list[float], batches: list[np.ndarray]
) -> tuple[list[float], list[float]]:
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = config.optimizer
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=optimizer.betas,
        eps=optimizer.eps,
    )
    losses, norms = [], []
    for lr, batch in zip(rates, batches, strict=True):
        ids = torch.from_numpy(batch)
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_grad).item())
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_twenty_steps_equal_transformers_and_torch_adamw(sample_data: Path, tmp_path: Path, family: str) -> None:
    config = make_config(sample_data, MODELS[family])
    (ours,) = run_ranks(1, _ours, config, tmp_path / family)
    losses, norms = _theirs(config, tmp_path / family, ours["rates"], ours["batches"])
    assert losses[-1] < losses[0] - 0.3
    np.testing.assert_allclose(ours["losses"], losses, rtol=TOLERANCE)
    np.testing.assert_allclose(ours["norms"], norms, rtol=TOLERANCE)
