"""Tuning recipes that the toys do not run, at toy size: raw file, token files, base, tuned model, export."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_med.tokenizer import load_tokenizer
from megatron_med.tokenizer.special import CHAT_TOKENS, extend_tokenizer
from tests.cli.processes import REPOSITORY, python, read_metrics, train_on_ranks

EXAMPLES = REPOSITORY / "examples"
TOY = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 176}
WIDER = {"hidden_size": 128, "intermediate_size": 256}
LENGTH = 1024
EOS = "<|endoftext|>"
"""End token of the tests' tokenizer."""


def _succeeded(*arguments: object) -> str:
    done = python(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _script(environment: dict[str, str], *arguments: object) -> None:
    command = ["bash", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def tokenizer(sample_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes") / "tokenizer"
    extend_tokenizer(sample_tokenizer, CHAT_TOKENS, folder)
    return folder


@pytest.fixture(scope="module")
def base(tokenizer: Path) -> Path:
    """A small Llama of the first LLaMA's shape, imported."""
    return _import(tokenizer, "base", TOY)


@pytest.fixture(scope="module")
def wide_base(tokenizer: Path) -> Path:
    """The same, which two ranks cut into whole blocks of 64."""
    return _import(tokenizer, "wide", TOY | WIDER)


def _import(tokenizer: Path, name: str, shape: dict[str, int]) -> Path:
    folder = tokenizer.parent
    torch.manual_seed(3)
    sizes = {"vocab_size": load_tokenizer(tokenizer).vocab_size, "max_position_embeddings": LENGTH}
    LlamaForCausalLM(LlamaConfig(**shape, **sizes)).save_pretrained(folder / f"{name}-hf")
    _succeeded(
        *("tools/convert_checkpoint.py", "import", "--from", folder / f"{name}-hf"),
        *("--tokenizer", tokenizer, "--to", folder / name),
    )
    return folder / name


def _tune(
    recipe: str, data: list[dict[str, Any]], base: Path, run: Path, *options: object, ranks: int = 2
) -> list[float]:
    """The recipe with a toy's shape, data and learning rate; losses."""
    toy = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 176,
        "vocab_size": 514,
        "num_query_groups": 4,
        "head_dim": 16,
        "max_position_embeddings": LENGTH,
        "norm_eps": 1e-6,
    }
    shape = [word for name, value in toy.items() for word in (f"--model.{name}", value)]
    sources = json.dumps(data)
    train_on_ranks(
        ranks,
        EXAMPLES / recipe,
        *(*shape, "--data.sequence_length", LENGTH, "--data.train", sources, "--data.valid", sources),
        *("--checkpoint.load", base, "--train.output_dir", run, "--train.epochs", "null", "--train.steps", 12),
        *("--train.global_batch_size", 8, "--train.micro_batch_size", 2, "--train.valid_samples", 8),
        *("--optimizer.lr", 1e-2, "--precision", "fp32", "--lr_schedule.warmup_steps", 0),
        *("--lr_schedule.warmup_fraction", "null", "--train.valid_interval", 6, *options),
    )
    return [line["loss"] for line in read_metrics(run)]


def _export(checkpoint: Path, target: Path, ends_with: str) -> None:
    """As transformers loads it, with the template and the token that ends a turn."""
    _succeeded("tools/convert_checkpoint.py", "export", "--from", checkpoint, "--to", target, "--verify")
    theirs = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.generation_config.eos_token_id == theirs.convert_tokens_to_ids(ends_with)
    assert theirs.apply_chat_template([{"role": "user", "content": "Why?"}], add_generation_prompt=True)


@pytest.mark.slow
def test_alpaca_then_medalpaca(
    shared: Path, tokenizer: Path, base: Path, tmp_path: Path, forked_environment: dict[str, str]
) -> None:
    """The two stages by LoRA: what the first has tuned is the base of the second. The toy of MedAlpaca runs 7b."""
    prepare = EXAMPLES / "medalpaca" / "prepare.sh"
    first, second = (
        shared / "instruct" / "gsm8k_alpaca.json",
        shared / "instruct" / "medical_meadow_wikidoc_patient.json",
    )
    _script(forked_environment, prepare, "alpaca", tokenizer, tmp_path / "alpaca", 100, first)
    _script(forked_environment, prepare, "medalpaca", tokenizer, tmp_path / "meadow", 0.1, second)
    lines = (tmp_path / "meadow-valid.jsonl").read_text().splitlines()
    assert len(lines) == 200
    for stage, data in (("alpaca", "alpaca-train"), ("medalpaca", "meadow-train")):
        run = tmp_path / stage
        recipe, sets = f"medalpaca/{stage}_13b_lora.yaml", [{"path": str(tmp_path / data)}]
        losses = _tune(recipe, sets, base, run, "--optimizer.lr", 5e-2)
        assert losses[-1] < losses[0] - 0.02  # a base that has learnt nothing has little to adapt
        base = tmp_path / f"{stage}-merged"
        _succeeded("tools/convert_adapter.py", "merge", "--from", run, "--to", base)
    _export(base, tmp_path / "hf", EOS)


@pytest.mark.slow
def test_medalpaca_in_few_bits(
    shared: Path, tokenizer: Path, wide_base: Path, tmp_path: Path, forked_environment: dict[str, str]
) -> None:
    """From raw file to adapter and merged model, on one process and at TP 2 x PP 2. The toy of MedAlpaca runs int8."""
    raw = shared / "instruct" / "medical_meadow_wikidoc_patient.json"
    _script(
        forked_environment, EXAMPLES / "medalpaca" / "prepare.sh", "medalpaca", tokenizer, tmp_path / "meadow", 0.1, raw
    )
    data = [{"path": str(tmp_path / "meadow-train")}]
    wider = ("--model.hidden_size", 128, "--model.head_dim", 32, "--model.ffn_hidden_size", 256)
    common = (*wider, "--optimizer.lr", 5e-2, "--lora.dropout", 0, "--lora.rank", 32, "--train.micro_batch_size", 1)
    curves = []
    for ranks, grid in ((1, ()), (4, ("--parallel.tensor", 2, "--parallel.pipeline", 2))):
        run = tmp_path / f"run-{ranks}"
        curves.append(_tune("medalpaca/medalpaca_13b_lora_nf4.yaml", data, wide_base, run, *common, *grid, ranks=ranks))
        assert curves[-1][-1] < curves[-1][0] - 0.02
        step = next((run / "checkpoints").glob("step-*"))
        described = json.loads((step / "state.json").read_text())["adapter"]
        assert described["quantize"]["base"] == "nf4"
    np.testing.assert_allclose(*curves, rtol=1e-3)
    convert = "tools/convert_adapter.py"
    _succeeded(
        convert, "export", "--from", run, "--base-model", tokenizer.parent / "wide-hf", "--to", tmp_path / "peft"
    )
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tokenizer.parent / "wide-hf"), tmp_path / "peft"
    )
    told = _succeeded(convert, "merge", "--from", run, "--to", tmp_path / "merged")
    assert "these adapters were trained beside weights in nf4" in told
    _export(tmp_path / "merged", tmp_path / "hf", EOS)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.arange(5, 60).unsqueeze(0)
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    answers = [
        _succeeded(
            "tools/generate.py", "--checkpoint", run, "--prompt", "What is asthma?", "--max-new-tokens", 8, *flags
        )
        for flags in ((), ("--quantize", "nf4"), ("--quantize", "none"))
    ]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_meditrons_set_at_70b(
    shared: Path, tokenizer: Path, base: Path, tmp_path: Path, forked_environment: dict[str, str]
) -> None:
    """The toy of Meditron runs 7b, and the other sets."""
    raw, run = shared / "qa" / "medqa_us_4opt_a.jsonl", tmp_path / "run"
    script = EXAMPLES / "gap_replay" / "sft" / "prepare.sh"
    _script(forked_environment, script, "medqa", "answer", raw, tmp_path / "medqa", tokenizer)
    grid = ("--parallel.tensor", 2, "--parallel.pipeline", 2)
    losses = _tune("gap_replay/sft/70b.yaml", [{"path": str(tmp_path / "medqa")}], base, run, *grid, ranks=4)
    assert losses[-1] < losses[0] - 0.5
    _export(run, tmp_path / "hf", "<|im_end|>")
