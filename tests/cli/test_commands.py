"""The installed command: its names, runs on several processes and how they end, what a run says of itself, the API."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_med.commands.__main__ import COMMANDS
from megatron_med.data.jsonl import read_lines
from megatron_med.files import write_text
from megatron_med.train.reporters import Console, WeightsAndBiases, in_groups
from megatron_med.train.run_folder import RunFolder
from tests.cli.processes import (
    descendants,
    environment,
    python,
    read_metrics,
    started,
    train,
    wait_for_step,
    write_config,
)
from tests.conftest import REPOSITORY, SAMPLE

COMMAND = ("-m", "megatron_med.commands")
MODEL = {"preset": "llama-tiny", "vocab_size": 512}


def _config(folder: Path, data: Path, **sections: Any) -> Path:
    sections["train"] = {"steps": 4, "micro_batch_size": 1} | sections.get("train", {})
    return write_config(folder, data, model=MODEL, data={"sequence_length": 64}, **sections)


def _launched(*arguments: object) -> list[str]:
    ranks = ("train", "--nproc-per-node", 2, "--standalone", "--")
    return [sys.executable, *COMMAND, *map(str, (*ranks, *arguments))]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    done = python(*COMMAND, *name.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout
    assert name == "train" or f"megatron-med {name}" in done.stdout


def test_every_tool_is_a_command_and_the_other_way_round() -> None:
    tools = {path.stem for path in (REPOSITORY / "tools").glob("*.py")}
    assert tools == {command.module for command in COMMANDS.values() if command.module}
    for tool in tools:
        assert f"from megatron_med.commands.{tool} import main" in (REPOSITORY / "tools" / f"{tool}.py").read_text()


def test_a_name_that_is_none_is_told_with_the_nearest(tmp_path: Path) -> None:
    assert python(*COMMAND).returncode == 2
    assert "corpus report" in python(*COMMAND, "--help").stdout
    wrong = python(*COMMAND, "trian")
    assert (wrong.returncode, "Did you mean train?" in wrong.stderr) == (2, True)
    assert "megatron-med corpus build, megatron-med corpus report" in python(*COMMAND, "corpus").stderr
    without = python(*COMMAND, "train", "--nproc-per-node", 2, tmp_path / "config.yaml")
    assert without.returncode == 2
    assert "The -- is missing" in without.stderr
    assert re.fullmatch(r"megatron_med \d+\.\d+\.\d+\n", python(*COMMAND, "--version").stdout)


def test_a_refused_configuration_is_a_line_a_fault_and_code_2(sample_data: Path, tmp_path: Path) -> None:
    config = _config(tmp_path, sample_data)
    done = subprocess.run(
        _launched(config, "--parallel.tensor", 3),
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines), lines
    assert any("parallel.tensor" in line for line in lines)


@pytest.mark.parametrize(
    ("launcher", "told"),
    [
        (("--nproc-per-node", "0"), "--nproc-per-node is 0: at least 1 is needed."),
        (("--nproc-per-node", "x"), "Unsupported nproc_per_node value: x"),
        (("--nproc-per-node", "2", "--rdzv-backend", "post"), "The rendezvous backend 'post' is not registered"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate"),
    ],
    ids=["0", "x", "post", "frobnicate"],
)
def test_options_that_torchrun_does_not_take_are_told(launcher: tuple[str, ...], told: str) -> None:
    done = python(*COMMAND, "train", *launcher, "--", "config.yaml")
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("plan",),
         "the following arguments are required: config, --cluster. megatron-med plan --help lists what there is."),
        (("export", "--from", "a", "--to", "b", "--verfy"),
         "unrecognized arguments: --verfy (did you mean --verify?). megatron-med --help lists what there is."),
        (("generate", "--checkpoint", "x", "--max-new-tokens", "five"),
         "argument --max-new-tokens: invalid int value: 'five'. megatron-med generate --help lists what there is."),
    ],
    ids=["missing", "misspelt", "no number"],
)  # fmt: skip
def test_an_option_that_cannot_be_read_is_one_line(options: tuple[str, ...], told: str) -> None:
    done = python(*COMMAND, *options)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: {told}"]


def test_a_run_ends_with_the_code_of_its_ranks(sample_data: Path, tmp_path: Path) -> None:
    """Asked to stop it saves and ends with 75; where a rank is killed it ends with 1."""
    config = _config(tmp_path, sample_data, train={"steps": 400}, checkpoint={"interval": 0})
    run, log = tmp_path / "run", tmp_path / "log"
    with started(_launched(config), log) as process:
        wait_for_step(run, 2, process, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 75
    text = log.read_text()
    assert "Traceback" not in text
    assert "start again to go on" in text
    done = len(read_metrics(run))
    with started(_launched(config), log) as process:
        wait_for_step(run, done + 1, process, log)
        ranks = [pid for pid in descendants(process.pid) if _is_rank(pid)]
        assert len(ranks) == 2
        os.kill(ranks[-1], signal.SIGKILL)
        assert process.wait(120) == 1
    assert "torch/distributed/elastic" not in log.read_text()
    assert train(config, "--train.steps", done).returncode == 0


def _is_rank(pid: int) -> bool:
    return b"megatron_med.train\0" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_run_says_what_it_does_before_it_begins(sample_data: Path, tmp_path: Path) -> None:
    config = _config(tmp_path, sample_data, train={"steps": 3}, logging={"tensorboard": True})
    told = train(config).stdout
    tokens = json.loads(Path(f"{sample_data}.json").read_text())["tokens"]
    samples = (tokens - 1) // 64
    for words in (
        "model    llama-tiny (llama): ",
        "grid     1 rank: tensor 1 x pipeline 1 x data 1; a step is 8 samples, 8 micro-batches of 1",
        "device   CPU",
        f"data     {tokens:,} tokens of text, {samples:,} samples of 64 tokens; steps 1 to 3 read 24: ",
        f"{24 / samples:.3g} epochs (sample)",
        "begins   with initial weights",
        f"writes   {tmp_path / 'run'}: a checkpoint",
        "\nstep 1/3 | loss ",
    ):
        assert words in told, told
    again = train(config, "--train.steps", 5).stdout
    assert f"begins   where it stopped: {tmp_path / 'run' / 'checkpoints' / 'step-00000003'}" in again
    assert "steps 4 to 5 read 16" in again
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {tag.split("/")[0] for tag in tags} == {"train", "speed"}
    assert {"train/loss", "train/lr", "train/grad_norm", "speed/tokens_per_second"} <= set(tags)
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_curves_are_in_groups_and_without_noise() -> None:
    metrics = {
        "step": 3,
        "time": 1e9,
        "loss": 2.0,
        "valid_loss": 2.5,
        "mfu": None,
        "skipped": False,
        "eta_seconds": 9.0,
    }
    metrics |= {"data_seconds": 0.1, "loss_scale": None, "consumed_samples": 24}
    assert dict(in_groups(metrics)) == {"train/loss": 2.0, "valid/loss": 2.5, "speed/data_seconds": 0.1}


def test_the_console_speaks_at_the_first_step_and_after_half_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"loss": 1.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 9.0, "tflops_per_device": 1.0}
    numbers |= {"mfu": None, "eta_seconds": 60.0, "skipped": False}
    console = Console(interval=10, steps=100)
    for step, moment in ((1, 0.0), (2, 10.0), (3, 29.0), (4, 31.0), (5, 40.0), (10, 45.0), (100, 46.0)):
        console.report(numbers | {"step": step, "time": moment})
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split("/")[0].split()[1]) for line in lines] == [1, 4, 10, 100]


def test_all_starts_of_a_run_are_one_run_of_wandb(
    sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_med.api import load_config

    begun: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []
    run = SimpleNamespace(log=lambda metrics, step: logged.append(metrics), finish=lambda: None)
    fake = SimpleNamespace(init=lambda **options: begun.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    config = load_config(_config(tmp_path, sample_data), {"logging.wandb": True})
    (tmp_path / "run").mkdir()
    for _ in range(2):
        WeightsAndBiases(config, RunFolder(config.train.output_dir)).report({"step": 1, "loss": 2.0})
    first, second = begun
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert first["config"]["train"]["steps"] == 4
    assert first["config"]["model"]["vocab_size"] == 512
    assert logged == [{"train/loss": 2.0}] * 2


EXAMPLE = REPOSITORY / "docs" / "api.md"


def test_the_example_of_the_api_runs(sample_data: Path, tmp_path: Path) -> None:
    """The first box of docs/api.md, with a small configuration."""
    code = EXAMPLE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    config = _config(tmp_path, sample_data)
    for name, path in (("config.yaml", config), ("runs/first", tmp_path / "first"), ("out/hf", tmp_path / "hf")):
        assert name in code
        code = code.replace(name, str(path))
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path / "first")) == 20
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert done.stdout.count("\n[") == 1, "one list of answers"
    assert "seconds a step" in done.stdout


_MISUSED = """
import sys
from megatron_med.api import export_huggingface, generate, load_config, plan, train
from megatron_med.errors import ConfigError

path, run = sys.argv[1:]
hook = sys.excepthook
for call in (
    lambda: generate(run, "Patients"),
    lambda: generate(run, ["Patients"], stop="."),
    lambda: generate(run, ["Patients"], max_new_tokens=0),
    lambda: generate(run, ["Patients"], precision="fp8"),
    lambda: generate(run, ["Patients"], temp=0.7),
    lambda: plan(load_config(path), "a100-80g:1x1"),
    lambda: plan(load_config(path, {"precision": "bf16", "parallel.tensor": 2}, world_size=2), "a100-80g:1x1"),
    lambda: train(load_config(path, {"parallel.tensor": 2}, world_size=2)),
    lambda: load_config(path, {"train.steps": "three"}),
    lambda: train("config.yaml"),
    lambda: plan({"model": 1}, "a100-80g:1x1"),
    lambda: plan(load_config(path), None),
    lambda: export_huggingface(run, run, dtype="fp8"),
):
    try:
        call()
    except ConfigError as error:
        print(error)
    else:
        print("taken")
print(load_config(path, {"train.output_dir": "20261130"}).train.output_dir, sys.excepthook is hook)
"""


def test_the_api_refuses_what_cannot_be_meant(sample_data: Path, tmp_path: Path) -> None:
    done = python("-c", _MISUSED, _config(tmp_path, sample_data), tmp_path / "none")
    assert done.returncode == 0, done.stderr
    for line, words in zip(
        done.stdout.splitlines(),
        (
            "prompts is no list of texts: give ['Patients'] for a single one.",
            "stop is no list of texts: give ['.'] for a single one.",
            "max_new_tokens is 0: it must be at least 1.",
            "precision is fp8: it can be fp32 or bf16.",
            "generate takes no temp; of how tokens are chosen there are temperature",
            "precision is fp32: the figures of clusters are for half precision.",
            "The world size is 1: parallel.tensor x parallel.pipeline = 2 x 1",
            "The world size is 1: parallel.tensor x parallel.pipeline = 2 x 1",
            "train.steps is 'three'",
            "'config.yaml' is no configuration: give what load_config returns.",
            "{'model': 1} is no configuration: give what load_config returns.",
            "cluster is None: give KIND:NODESxGPUS, such as a100-80g:16x8.",
            "dtype is fp8: it can be fp32, bf16, fp16.",
            "20261130 True",
        ),
        strict=True,
    ):
        assert line.startswith(words)


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (["train", "nope.yaml", "--", "--train.steps", "3"], {}, "nope.yaml stands before --, where only torchrun's"),
        (["train", "--nproc-per-node", "2", "--", "nope.yaml"], {"RANK": "0", "WORLD_SIZE": "1"}, "RANK is set: this"),
        (["corpus", "biuld", "x.yaml"], {}, "has no command 'corpus biuld'. Did you mean corpus build?"),
    ],
)
def test_words_in_the_wrong_place_are_told_in_a_line(arguments: list[str], env: dict[str, str], message: str) -> None:
    done = python(*COMMAND, *arguments, env=env)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    helped = python(*COMMAND, "help", "inspect")
    assert helped.returncode == 0
    assert "--document" in helped.stdout


def test_parquet_gives_the_token_files_of_json_lines(sample_tokenizer: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [json.loads(line.content)["text"] for line in read_lines([SAMPLE])]
    write_text(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    common = ("--tokenizer", sample_tokenizer, "--append-eod", "--workers", 2)

    def made(name: str, file: str, *options: object) -> bytes:
        target = ("--input", tmp_path / file, "--output-prefix", tmp_path / name)
        done = python(*COMMAND, "preprocess", *target, *common, *options)
        assert done.returncode == 0, done.stderr
        return (tmp_path / f"{name}.bin").read_bytes()

    whole = made("lines", "a.jsonl")
    assert made("table", "a.parquet") == whole
    parts = [made(f"part{number}", "a.parquet", "--shard", f"{number}/3") for number in range(3)]
    assert all(parts)
    assert b"".join(parts) == whole
    folders = []
    for file in ("a.jsonl", "a.parquet"):
        folders.append(tmp_path / f"tokenizer-{file}")
        trained = python(
            *(*COMMAND, "train-tokenizer", "--input", tmp_path / file, "--vocab-size", 400, "--output", folders[-1])
        )
        assert trained.returncode == 0, trained.stderr
    assert (folders[0] / "tokenizer.json").read_bytes() == (folders[1] / "tokenizer.json").read_bytes()
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:5000])
    cut = python(
        *COMMAND, "preprocess", "--input", tmp_path / "cut.parquet", "--output-prefix", tmp_path / "x", *common
    )
    assert cut.returncode == 2
    assert "is no Parquet file that can be read" in cut.stderr
    other = python(
        *(*COMMAND, "preprocess", "--input", tmp_path / "a.parquet", "--output-prefix", tmp_path / "x", *common),
        *("--json-key", "body"),
    )
    assert "a.parquet, record 1: no key 'body'" in other.stderr


@pytest.mark.slow
def test_an_installed_wheel_has_all_that_it_needs(tmp_path: Path) -> None:
    """``pip install --no-build-isolation .`` from a copy, used outside the repository."""
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(tmp_path / "clone")], check=True, timeout=60)
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", str(site)]
    subprocess.run([*install, str(tmp_path / "clone")], check=True, timeout=240, capture_output=True)
    script = site / "bin" / "megatron-med"
    text = tmp_path / "text.jsonl"
    text.write_bytes(SAMPLE.read_bytes())
    env = environment() | {"PYTHONPATH": str(site)}

    def run(*arguments: object) -> str:
        command = [sys.executable, str(script), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = (
        "import megatron_med.kernels.native as native, _megatron_med_index as index; "
        "from importlib.util import find_spec; "
        "print(native.__file__, find_spec('_megatron_med_kernels').origin, index.__file__)"
    )
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert where.stdout.count(str(site)) == 3, where.stderr
    run("train-tokenizer", "--input", text, "--vocab-size", 400, "--output", "tokenizer")
    run("preprocess", "--input", text, "--output-prefix", "notes", "--tokenizer", "tokenizer", "--append-eod")
    alpaca = tmp_path / "clone" / "examples" / "medalpaca" / "toy" / "alpaca.json"
    run(
        *("preprocess-instructions", "--input", alpaca, "--output-prefix", "qa"),
        *("--tokenizer", "tokenizer", "--template", "alpaca"),
    )
    assert "medqa_4options" in run("evaluate", "--list")
