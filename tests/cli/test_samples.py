"""Texts that a run writes at every validation, under every kind of topology."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.cli.processes import python, train, train_on_ranks, write_config

PROMPTS = ["People with heart failure", "Fever"]
MODEL = {"preset": "llama-tiny", "vocab_size": 512, "num_layers": 4}


def _config(folder: Path, data: Path, **sections: Any) -> Path:
    sections["logging"] = {"sample_prompts": PROMPTS, "sample_tokens": 12} | sections.get("logging", {})
    return write_config(
        folder,
        data,
        model=MODEL,
        data={"sequence_length": 64, "valid": [{"path": str(data)}]},
        train={"steps": 4, "valid_interval": 2, "valid_samples": 8},
        optimizer={"lr": 3.0e-3},
        **sections,
    )


def _samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


GRIDS = {
    "sequence-parallel": {"tensor": 2},
    "interleaved": {"pipeline": 2, "virtual_stages": 2, "schedule": "interleaved"},
    "full-sharding": {"sharding": "full"},
    "all-at-once": {"tensor": 2, "pipeline": 2},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, sample_data: Path) -> Path:
    """The same run on one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = train(_config(folder, sample_data, logging={"tensorboard": True}))
    assert done.returncode == 0, done.stderr
    samples = _samples(folder / "run")
    for sample in samples:
        assert f"  {sample['prompt']!r} -> {sample['text']!r}\n" in done.stdout
    return folder / "run"


def test_samples_are_what_the_saved_model_writes(alone: Path) -> None:
    samples = _samples(alone)
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(step, p) for step in (2, 4) for p in PROMPTS]
    for sample in samples[2:]:
        done = python("tools/generate.py", "--checkpoint", alone, "--prompt", sample["prompt"], "--max-new-tokens", 12)
        assert done.stdout == sample["prompt"] + sample["text"] + "\n"
    events = EventAccumulator(str(alone / "tensorboard"))
    events.Reload()
    texts = events.Tensors("samples/1/text_summary")
    assert [event.step for event in texts] == [2, 4]
    assert b"<strong>" not in texts[0].tensor_proto.string_val[0], "it is Markdown"
    assert texts[0].tensor_proto.string_val[0].startswith(b"**Fever**")


@pytest.mark.parametrize("parallel", GRIDS.values(), ids=GRIDS)
def test_samples_are_the_same_on_every_grid(
    alone: Path, tmp_path: Path, sample_data: Path, parallel: dict[str, Any]
) -> None:
    ranks = max(2, parallel.get("tensor", 1) * parallel.get("pipeline", 1))
    train_on_ranks(ranks, _config(tmp_path, sample_data, parallel=parallel))
    assert _samples(tmp_path / "run") == _samples(alone)


def test_a_resumed_run_writes_each_sample_once(alone: Path, tmp_path: Path, sample_data: Path) -> None:
    config = _config(tmp_path, sample_data)
    assert train(config, "--train.steps", 2).returncode == 0
    first = (tmp_path / "run" / "samples.jsonl").read_bytes()
    (tmp_path / "run" / "samples.jsonl").write_bytes(first + b'{"step": 4, "prompt": "later"}\n{"step": 3, "pro')
    assert train(config).returncode == 0
    assert [sample["step"] for sample in _samples(tmp_path / "run")] == [2, 2, 4, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train.valid_interval", 0), "logging.sample_prompts are given and train.valid_interval is 0"),
        (("--logging.sample_tokens", 5000), "'People with heart failure' has"),
        (("--logging.sample_prompts", '[""]'), "logging.sample_prompts: '' is empty"),
        (("--logging.sample_temperature", -1), "logging.sample_temperature is -1.0"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_at_the_start(
    tmp_path: Path, sample_data: Path, options: tuple[Any, ...], message: str
) -> None:
    done = train(_config(tmp_path, sample_data), *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
