"""Every fault of a configuration is told at once, by value, rule and remedy; good ones resolve."""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_med.config import dump_config, load_config
from megatron_med.config.layers import cut_into_chunks, split_layers
from megatron_med.config.load import _leaves, peek_output_dir
from megatron_med.config.presets import PRESETS
from megatron_med.config.schema import Config, ModelConfig
from megatron_med.corpus.recipe import load_recipe
from megatron_med.errors import ConfigError

GOOD: dict[str, Any] = {
    "model": {"preset": "llama-tiny"},
    "data": {"sequence_length": 128, "train": [{"path": "a"}, {"path": "b", "weight": 0.5}]},
    "train": {"steps": 10, "global_batch_size": 8, "output_dir": "RUN"},
    "parallel": {"tensor": 2, "pipeline": 2},
}


def _write(tmp_path: Path, changes: dict[str, dict[str, Any] | str] | None = None) -> str:
    tree = {section: dict(fields) for section, fields in GOOD.items()}
    for section, fields in (changes or {}).items():
        tree[section] = {**tree.get(section, {}), **fields} if isinstance(fields, dict) else fields
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def _faults(arguments: list[str], world_size: int = 8) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments, world_size)
    return caught.value.faults


def test_a_misspelt_preset_is_the_only_fault(tmp_path: Path) -> None:
    """What it would have given is not missing, too. And a folder is no file."""
    (fault,) = _faults([_write(tmp_path, {"model": {"preset": "lama-tiny"}})])
    assert "Did you mean llama-tiny?" in fault
    (fault,) = _faults([str(tmp_path)])
    assert fault == f"{tmp_path} is a folder: give the path of a YAML file."


def test_preset_yaml_and_command_line_in_that_order(tmp_path: Path) -> None:
    path = _write(tmp_path, {"model": {"num_layers": 6}})
    config = load_config([path, "--model.hidden_size", "256", "--optimizer.betas=[0.8, 0.9]"], 8)
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_query_groups) == (6, 256, 4)
    assert config.optimizer.betas == (0.8, 0.9)
    assert [source.weight for source in config.data.train] == [1.0, 0.5]


_NUMBERS = [name for name, leaf in _leaves(Config).items() if "int" in str(leaf.type) or "float" in str(leaf.type)]


@pytest.mark.parametrize("name", _NUMBERS)
def test_every_number_has_a_range(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path, {"model": {"preset": "gpt2-tiny"}})
    for value in ("-1", ".nan", ".inf", "1e300"):
        several = name in ("optimizer.betas", "parallel.layers_per_stage")
        given = f"[{value}, {value}]" if several else value
        assert any(name in fault for fault in _faults([path, f"--{name}", given]))


def test_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config([_write(tmp_path)], 8)
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config([str(tmp_path / "resolved.yaml")], 8) == config


def test_all_faults_come_together_with_suggestions(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        {
            "model": {"num_layer": 3, "hidden_size": "wide"},
            "optimiser": {"lr": 1},
            "data": {"train": [{"path": "a", "wieght": 2}]},
        },
    )
    faults = _faults([path, "--train.step", "4", "--parallel.sharding", "zero"])
    text = "\n".join(faults)
    for expected in (
        "model.num_layer is not an option: did you mean model.num_layers?",
        "optimiser is not an option: did you mean optimizer?",
        "data.train[0].wieght is not an option: did you mean data.train[0].weight?",
        "train.step is not an option: did you mean train.steps?",
        "model.hidden_size is 'wide': expected a whole number.",
        "parallel.sharding is 'zero': expected one of none, optimizer, full.",
    ):
        assert expected in text
    assert len(faults) == 6


def test_missing_fields_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: {family: llama}\n")
    faults = _faults([str(tmp_path / "c.yaml")])
    named = {fault.split(" ")[0] for fault in faults}
    assert {"model.num_layers", "data.sequence_length", "train.steps", "train.output_dir"} <= named


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({}, 6, "These world sizes would: 4, 8, 12"),
        ({"parallel": {"tensor": 3, "pipeline": 1}}, 3, "num_attention_heads = 8. These sizes do: 1, 2, 4, 8"),
        ({"parallel": {"tensor": 8, "pipeline": 1}}, 8, "num_query_groups (key/value heads) = 4"),
        ({"model": {"vocab_size": 1000}, "parallel": {"tensor": 3, "pipeline": 1}}, 3, "padded to = 1024"),
        ({"parallel": {"tensor": 1, "pipeline": 5}}, 5, "Use at most 4 stages"),
        ({"train": {"global_batch_size": 9}}, 8, "Use 8 or 10"),
        ({"train": {"micro_batch_size": 3}}, 8, "= 3 x 2 = 6"),
        ({"data": {"sequence_length": 512}}, 8, "model.max_position_embeddings = 256"),
        ({"data": {"sequence_length": 127}}, 8, "parallel.sequence_parallel: false"),
        ({"parallel": {"layers_per_stage": [3, 2]}}, 8, "add up to 4"),
        ({"model": {"num_query_groups": 3}}, 8, "Choose a divisor of 8"),
        ({"train": {"steps": 0}}, 8, "train.steps is 0: it must be at least 1"),
        ({"lr_schedule": {"warmup_steps": 11}}, 8, "end of the decay, step 10"),
        ({"lr_schedule": {"min_lr": 1.0}}, 8, "lr_schedule.min_lr is 1.0"),
        ({"data": {"train": []}}, 8, "data.train is empty"),
        ({"train": {"valid_interval": 5}}, 8, "data.valid is empty"),
        ({"model": {"preset": "lama2-7b"}}, 8, "Did you mean llama2-7b?"),
        ({"model": {"hidden_dropout": 0.1}}, 8, "llama family has no dropout"),
        ({"train": {"seed": -1}}, 8, "train.seed is -1"),
        ({"model": {"init_std": -1.0}}, 8, "model.init_std is -1.0"),
        ({"model": {"norm_eps": -1.0}}, 8, "model.norm_eps is -1.0: it must be a number above 0"),
        ({"model": {"hidden_size": 10**12}}, 8, "model.hidden_size is 1000000000000: it must be at most 2147483647"),
        (
            {"model": {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0}}},
            8,
            "low_freq_factor is 4.0: it must be below high_freq_factor = 4.0",
        ),
        (
            {"model": {"rope_scaling": {"type": "linear", "factor": 0.0}}},
            8,
            "rope_scaling.factor is 0.0: it must be a number above 0",
        ),
        ({"model": {"preset": "gpt2-tiny", "rope_scaling": {"type": "linear", "factor": 2.0}}}, 8, "learned positions"),
        ({"optimizer": {"clip_grad": float("nan")}}, 8, "optimizer.clip_grad is nan"),
        ({"data": {"train": [{"path": "a", "weight": float("inf")}]}}, 8, "weight of a is inf"),
        ({"data": {"train": ["a"]}}, 8, "data.train[0] is 'a': expected keys with values: path, weight, repeat."),
    ],
)
def test_broken_rule_says_value_rule_and_remedy(
    tmp_path: Path, changes: dict[str, Any], world_size: int, message: str
) -> None:
    assert message in "\n".join(_faults([_write(tmp_path, changes)], world_size))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--parallel.context 2", "parallel.context is 2: not yet supported"),
        ("--parallel.schedule interleaved --parallel.pipeline 2", "interleaved with parallel.virtual_stages = 1"),
        (
            "--parallel.schedule interleaved --parallel.virtual_stages 2 --parallel.pipeline 1",
            "parallel.pipeline = 1: it needs 2 or more",
        ),
        (
            "--parallel.virtual_stages 2 --parallel.pipeline 2",
            "parallel.virtual_stages is 2 with parallel.schedule 1f1b",
        ),
        (
            "--parallel.schedule interleaved --parallel.virtual_stages 4 --parallel.pipeline 2",
            "parallel.pipeline x parallel.virtual_stages is 8 and model.num_layers 4",
        ),
        (
            "--parallel.schedule interleaved --parallel.virtual_stages 2 --parallel.pipeline 2 "
            "--parallel.layers_per_stage [1,1,1]",
            "it needs 4 numbers of at least 1",
        ),
        (
            "--parallel.layers_per_stage [2,1] --parallel.pipeline 2",
            "add up to 4 (model.num_layers)",
        ),
        ("--parallel.replicate 2 --parallel.sharding none", "parallel.replicate is 2: with parallel.sharding none"),
        (
            "--parallel.replicate 3 --parallel.tensor 1 --parallel.pipeline 1",
            "must divide the data-parallel size 8. These would: 1, 2, 4, 8.",
        ),
        (
            "--parallel.sharding full --parallel.schedule zero_bubble --parallel.pipeline 2",
            "zero_bubble with parallel.sharding full",
        ),
        (
            "--parallel.sharding full --parallel.tensor 1 --parallel.pipeline 1 --model.ffn_hidden_size 100",
            "they must divide model.ffn_hidden_size",
        ),
        ("--recompute_interval 2", "recompute_interval is 2 and recompute none: only full counts layers"),
        ("--parallel.sharding full --parallel.overlap.weight_gather false", "FSDP2 always overlaps"),
        ("--train.timeout_minutes -1", "train.timeout_minutes is -1.0: it must be a number above 0"),
        ("--recompute_interval 0", "recompute_interval is 0: it must be at least 1."),
        ("--precision fp16 --optimizer.min_loss_scale 0", "optimizer.min_loss_scale is 0.0: it must be above 0"),
        ("--optimizer.groups '[{match: x, lr_scale: -1}]'", "optimizer.groups: x has lr_scale -1"),
    ],
)
def test_combinations_that_cannot_run_are_refused(tmp_path: Path, options: str, message: str) -> None:
    faults = _faults([_write(tmp_path), *shlex.split(options)])
    assert any(message in fault for fault in faults), faults


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    assert "no configuration file" in _faults([str(tmp_path / "absent.yaml")])[0]
    (tmp_path / "c.yaml").write_text("model: {a: [1, 2\n")
    assert "is not YAML" in _faults([str(tmp_path / "c.yaml")])[0]
    assert any("No configuration was given" in fault for fault in _faults([]))
    assert "has no value" in _faults([_write(tmp_path), "--train.steps"])[0]
    assert "--train is a section" in _faults([_write(tmp_path), "--train", "5", "--train.steps", "3"])[0]


def test_help_shows_every_field_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load_config(["--help"], 1)
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for section in dataclasses.fields(Config):
        assert f"--{section.name}" in text
    assert "Tensor-parallel ranks: matrices are cut over them." in " ".join(text.split())


def test_print_config_is_yaml_with_the_given_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config([_write(tmp_path), "--optimizer.lr", "0.5", "--print_config"], 8)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optimizer"]["lr"] == 0.5
    assert printed["model"]["num_layers"] == 4
    assert printed["checkpoint"]["keep"] == 3


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_layers_are_split_by_cost_and_none_is_lost(preset: str, stages: int) -> None:
    model = ModelConfig(**PRESETS[preset])
    counts = split_layers(model, stages)
    assert sum(counts) == model.num_layers
    assert counts[-1] == min(counts), "the stage with the head never gets more"
    assert [layer for (chunk,) in cut_into_chunks(model, stages) for layer in chunk.layers] == list(
        range(model.num_layers)
    )


def test_a_heavy_head_takes_layers_from_its_stage() -> None:
    model = ModelConfig("llama", 12, 256, 8, 8192, 512, ffn_hidden_size=704)
    counts = split_layers(model, 4)
    assert counts[-1] == 1
    assert sorted(counts[:-1]) == [3, 4, 4]


_DESIGN_EXAMPLE = """
model:
  family: llama
  num_layers: 4
  hidden_size: 128
  num_attention_heads: 8
  num_query_groups: 4
  ffn_hidden_size: 352
  vocab_size: 32000
  max_position_embeddings: 256
  init_std: 0.02
parallel: {tensor: 2, pipeline: 2, virtual_stages: 1, context: 1, sharding: optimizer, replicate: 1,
           sequence_parallel: true, schedule: 1f1b}
data:
  sequence_length: 128
  tokenizer: null
  train: [{path: out/pubmed, weight: 1.0}]
  valid: [{path: out/pubmed-valid, weight: 1.0}]
optimizer: {name: adamw, lr: 1.0e-3, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.1, clip_grad: 1.0}
lr_schedule: {name: cosine, warmup_steps: 10, decay_steps: null, min_lr: 1.0e-4}
precision: bf16
recompute: none
train: {steps: 200, micro_batch_size: 1, global_batch_size: 8, seed: 7, output_dir: RUN, valid_interval: 50,
        valid_samples: 256}
checkpoint: {interval: 100, keep: 3, keep_every: null, load: null, load_state: weights}
logging: {interval: 1, tensorboard: true, wandb: false}
"""


def test_every_name_of_the_contract_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(_DESIGN_EXAMPLE)
    config = load_config([str(tmp_path / "c.yaml")], 8)
    assert (config.parallel.tensor, config.train.valid_samples, config.precision) == (2, 256, "bf16")
    assert config.model.head_dim == 16


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train: {steps: 3, output_dir: a, steps: 4}", "line 1: the key 'steps' stands twice, first in line 1"),
        ("optimizer:\n  lr: 3.0e-3\n  eps: 1.0e-8\n  lr: 1.0e-3", "line 4: the key 'lr' stands twice, first in line 2"),
        ("train: {steps: 010}", "010 begins with 0, which YAML takes for an octal number: write 10"),
        ("train: {seed: 1:30}", "1:30 is a number to the base of 60"),
        ("? [a, b]\n: 1", "a key is a list"),
    ],
)
def test_yaml_that_misleads_is_refused_by_line(tmp_path: Path, line: str, message: str) -> None:
    """In a configuration, on the command line and in a corpus recipe."""
    (tmp_path / "c.yaml").write_text(f"{line}\n")
    for read in (lambda: load_config([str(tmp_path / "c.yaml")], 1), lambda: load_recipe(tmp_path / "c.yaml")):
        with pytest.raises(ConfigError) as caught:
            read()
        assert message in str(caught.value)
    assert "write 10" in _faults([_write(tmp_path), "--train.steps", "010"])[0]


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path)
    config = load_config([path, "--train.steps", "1e3", "--optimizer.lr", "3e-4", "--optimizer.eps", "1.5E-8"], 8)
    assert (config.train.steps, config.optimizer.lr, config.optimizer.eps) == (1000, 3e-4, 1.5e-8)
    with pytest.raises(SystemExit) as ended:
        load_config([path, "--train.steps", "1e3", "--optimizer.lr", "1e-3", "--print_config"], 8)
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["train"]["steps"], printed["optimizer"]["lr"]) == (1000, 1e-3)


def test_paths_are_expanded_wherever_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch")
    path = _write(
        tmp_path,
        {
            "data": {"train": [{"path": "~/a"}], "cache_dir": "${SCRATCH}/cache", "tokenizer": "~/v.json,~/m.txt"},
            "train": {"output_dir": "$SCRATCH/run"},
        },
    )
    config = load_config([path, "--checkpoint.load", "~/base"], 8)
    assert config.data.train[0].path == f"{tmp_path}/a"
    assert config.data.tokenizer == f"{tmp_path}/v.json,{tmp_path}/m.txt"
    assert (config.data.cache_dir, config.train.output_dir) == ("/scratch/cache", "/scratch/run")
    assert config.checkpoint.load == f"{tmp_path}/base"
    assert peek_output_dir([path]) == "/scratch/run"
    monkeypatch.delenv("SCRATCH")
    faults = _faults([path])
    assert (
        "train.output_dir is '$SCRATCH/run': the environment has no $SCRATCH. Write the path out, or set it." in faults
    )
    assert len(faults) == 2
    assert peek_output_dir([path]) is None
    (tmp_path / "in.jsonl").touch()
    source = {"kind": "abstracts", "input": "~/in.jsonl", "license": "CC0"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"output": "~/corpus", "sources": {"one": source}}))
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.output == f"{tmp_path}/corpus"
    assert recipe.inputs("one") == [tmp_path / "in.jsonl"]


def test_what_stands_empty_or_against_itself(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(Path(_write(tmp_path)).read_text() + "logging:\ncheckpoint:\n")
    assert load_config([str(path)], 8).checkpoint.keep == 3
    assert _faults([str(path), "--train.steps", "5", "--train.steps.x", "6"]) == [
        "train.steps.x is given, and steps itself as 5: leave one of them out."
    ]
    assert (
        "model.rope_scaling is given, and model.rope_scaling.factor by itself"
        in _faults([str(path), "--model.rope_scaling.factor", "8", "--model.rope_scaling", "null"])[0]
    )
    assert _faults([str(path), "--precision", "null"]) == ["precision is null: expected one of fp32, bf16, fp16."]
    assert "data.valid is null: expected a list" in _faults([str(path), "--data.valid", "null"])[0]
    assert _faults([str(path), "--train.steps", "abc", "--print_config"]) == [
        "train.steps is 'abc': expected a whole number."
    ]
    assert "train.stepz is not an option" in _faults([str(path), "--train.stepz", "5", "--print_config"])[0]


def test_an_option_in_two_spellings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: {steps: 6}\ntrain.steps: 3\n")
    with pytest.raises(ConfigError, match=r"train\.steps is given twice"):
        load_config([str(path)], 1)
    path.write_text("train: {timeout_minutes: 1:30.5}\n")
    with pytest.raises(ConfigError, match=r"1:30\.5 is a number to the base of 60"):
        load_config([str(path)], 1)
    path.write_text("model: " + "[" * 3000)
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_config([str(path)], 1)


def test_a_full_disk_takes_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = _write(tmp_path)
    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(ConfigError, match=r"--print_config cannot be printed: No space left on device"):
        load_config([path, "--print_config"], 8)
