"""Faults of disks, permissions, environments and damaged files: one line with the file and the remedy, code 2, and
nothing half-written left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_med.checkpoint.folder import describe_files, resolve_checkpoint
from tests.cli.processes import TIMEOUT, TRAIN, environment, python, read_metrics, train, write_config
from tests.conftest import REPOSITORY, SAMPLE

DISK = 3_000_000


@pytest.fixture
def config(tmp_path: Path, sample_data: Path) -> Path:
    return write_config(
        tmp_path,
        sample_data,
        model={"preset": "gpt2-tiny", "vocab_size": 512},
        data={"sequence_length": 32},
        train={"steps": 2, "global_batch_size": 2, "micro_batch_size": 1},
        checkpoint={"asynchronous": False},
    )


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of three megabytes on which only a few kilobytes are free."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a disk that can be filled is mounted by root only")
    try:
        with (disk / "full").open("wb", buffering=0) as file:
            free = os.statvfs(disk)
            file.write(bytes(free.f_bavail * free.f_bsize - 20_480))
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _told(done: subprocess.CompletedProcess[str], *messages: str) -> None:
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    for message in messages:
        assert message in errors[0], errors[0]


def test_a_full_disk(config: Path, full_disk: Path, tmp_path: Path, sample_data: Path, sample_tokenizer: Path) -> None:
    assert train(config).returncode == 0
    export = ("tools/convert_checkpoint.py", "export", "--from", tmp_path / "run", "--to")
    assert python(*export, tmp_path / "hf").returncode == 0
    raw = tmp_path / "large.jsonl"
    raw.write_bytes(SAMPLE.read_bytes() * 2)
    large = ("--input", SAMPLE, "--vocab-size", 3000, "--output")
    assert python("tools/train_tokenizer.py", *large, tmp_path / "tk").returncode == 0
    extend = ("tools/extend_tokenizer.py", "--tokenizer", tmp_path / "tk", "--tokens", "chatml", "--output")
    disk, tokens = full_disk, ("--tokenizer", sample_tokenizer)
    for name, *arguments in (
        ("out.bin", "tools/preprocess_data.py", "--input", raw, "--output-prefix", disk / "out", *tokens),
        ("out.bin", "tools/merge_datasets.py", "--input", sample_data, sample_data, "--output-prefix", disk / "out"),
        ("out", "tools/train_tokenizer.py", *large, disk / "out"),
        ("out", *extend, disk / "out"),
        ("out", *export, disk / "out"),
        ("out", export[0], "import", "--from", tmp_path / "hf", "--to", disk / "out"),
    ):
        done = python(*arguments)
        _told(done, f"error: {disk / name}", "No space left on device. Make room and start the same command again.")
        assert [path.name for path in disk.iterdir()] == ["full"]
    done = train(config, "--train.output_dir", disk / "run")
    _told(done, f"{disk}/run/checkpoints/step-00000002", "No space left on device", "Make room and start again.")
    assert not list((disk / "run" / "checkpoints").glob("step-*"))


_WITHOUT_POWERS = """
import contextlib, io, json, logging, runpy, sys
for command in json.loads(sys.argv[1]):
    heard = io.StringIO()
    sys.argv = command
    logging.getLogger().handlers.clear()  # they keep the stream of the command before
    with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, heard.getvalue()]))
"""


def _run_without_powers(commands: list[list[Any]]) -> list[subprocess.CompletedProcess[str]]:
    """Tools, one after the other, in a process that obeys permissions: root's own does not."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if drop and shutil.which("setpriv") is None:
        pytest.skip("root obeys no permissions, and setpriv is not there")
    words = [[str(word) for word in command] for command in commands]
    done = subprocess.run(
        [*drop, sys.executable, "-c", _WITHOUT_POWERS, json.dumps(words)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    ended = map(json.loads, done.stdout.splitlines())
    return [subprocess.CompletedProcess([], code, "", stderr) for code, stderr in ended]


def test_files_that_may_not_be_read(config: Path, tmp_path: Path, shared: Path, sample_data: Path) -> None:
    assert train(config).returncode == 0
    export = ("tools/convert_checkpoint.py", "export", "--from", tmp_path / "run", "--to")
    assert python(*export, tmp_path / "hf").returncode == 0
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    files = {
        "text": shutil.copy(SAMPLE, tmp_path / "text.jsonl"),
        "model": shutil.copy(shared / "tokenizers" / "llama2_tokenizer.model", tmp_path / "tokenizer.model"),
        "weights": tmp_path / "hf" / "model.safetensors",
        "config": shutil.copytree(tmp_path / "hf", tmp_path / "other") / "config.json",
        "metadata": resolve_checkpoint(tmp_path / "run") / ".metadata",
    }
    for ending in (".bin", ".idx", ".json"):
        shutil.copy(f"{sample_data}{ending}", tmp_path / f"data{ending}")
    files["tokens"] = tmp_path / "data.bin"
    for file in files.values():
        Path(file).chmod(0)
    preprocess = ("tools/preprocess_data.py", "--output-prefix", tmp_path / "out", "--input")
    convert = "tools/convert_checkpoint.py"
    commands: dict[Any, list[Any]] = {
        files["text"]: [*preprocess, files["text"], "--tokenizer", tmp_path / "hf"],
        files["model"]: [*preprocess, SAMPLE, "--tokenizer", files["model"]],
        files["weights"]: [convert, "import", "--from", tmp_path / "hf", "--to", tmp_path / "out"],
        files["config"]: [convert, "import", "--from", tmp_path / "other", "--to", tmp_path / "out"],
        files["metadata"]: ["tools/generate.py", "--checkpoint", tmp_path / "run", "--prompt-ids", 1],
        files["tokens"]: ["tools/inspect_data.py", tmp_path / "data"],
        closed / "t": ["tools/train_tokenizer.py", "--input", SAMPLE, "--vocab-size", 300, "--output", closed / "t"],
    }
    for file, done in zip(commands, _run_without_powers(list(commands.values())), strict=True):
        _told(done, f"error: {file}: Permission denied. Change its permissions, or name another.")
    assert not list(tmp_path.glob("out*"))


def test_a_cache_that_may_not_be_used_is_kept_in_memory(tmp_path: Path, config: Path) -> None:
    filled, closed, mute = (tmp_path / name for name in ("filled", "closed", "mute"))
    assert train(config, "--data.cache_dir", filled).returncode == 0
    expected = [line["loss"] for line in read_metrics(tmp_path / "run")]
    shutil.copytree(filled, mute)
    closed.mkdir()
    for path in (*mute.rglob("*.npy"), closed):
        path.chmod(0)
    runs = {cache: tmp_path / f"run-{number}" for number, cache in enumerate((closed, closed / "below", mute, SAMPLE))}
    script = tmp_path / "train.py"
    script.write_text("from megatron_med.train.__main__ import main\nimport sys\nsys.exit(main(sys.argv[1:]))\n")
    command = [script, config, "--train.output_dir"]
    done = _run_without_powers([[*command, run, "--data.cache_dir", cache] for cache, run in runs.items()])
    for run, ended in zip(runs.values(), done, strict=True):
        assert ended.returncode == 0, ended.stderr
        assert [line["loss"] for line in read_metrics(run)] == expected
    for cache, ended in zip(runs, done, strict=True):
        assert (f"The index cache {cache} cannot be written" in ended.stderr) is (cache != mute)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "RANK is '0' and WORLD_SIZE is not set: that is no rank. Start with torchrun"),
        ({"WORLD_SIZE": "8"}, "RANK is not set and WORLD_SIZE is '8'"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK is '4' and WORLD_SIZE is '4'"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is '' and MASTER_PORT ''"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "b"}, "MASTER_PORT 'b'"),
    ],
)
def test_an_environment_of_no_rank(config: Path, env: dict[str, str], message: str) -> None:
    _told(python(*TRAIN, config, env=env), message)


def test_damaged_records_of_a_run(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(config).returncode == 0
    metrics = run / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + b'{"step": 2, "name": "\xff"}\n\xff\xfe\n{"step"')
    assert train(config).returncode == 0
    assert metrics.read_bytes() == whole
    latest = run / "checkpoints" / "latest"
    for content in (
        b"\xff\xfe\n",
        b"step--0000002\n",
        b"step-2\n",
        "step-0000000\u0662\n".encode(),
        b"../../elsewhere\n",
        b"",
    ):
        latest.write_bytes(content)
        _told(train(config), "latest holds ", "not the name of a step; the newest there is step-00000002. Write that")
        generate = ("tools/generate.py", "--checkpoint", run, "--prompt-ids", 1)
        _told(python(*generate), "latest holds ", "not the name of a step")
    latest.write_text("step-00000002\n")
    step = run / "checkpoints" / "step-00000002"
    state = json.loads((step / "state.json").read_text())
    wrong = {"settings": [1], "model": 5, "frozen": None, "moments_since": [], "tokenizer": 3, "version": 99}
    wrong |= {"step": True, "initial_lr": "x", "consumed_samples": 10**30}
    _rewrite(step, json.dumps(state | {"settings": {"lr_schedule.decay_steps": 3.5}}).encode())
    _told(train(config), "hold lr_schedule.decay_steps = 3.5: no step")
    for changes in (
        {"step": -2},
        {"consumed_samples": "4"},
        {"optimizer_steps": 1.5},
        *({k: v} for k, v in wrong.items()),
    ):
        _rewrite(step, json.dumps(state | changes).encode())
        _told(
            train(config), "state.json cannot be read (" + ("it is of" if "version" in changes else next(iter(changes)))
        )


def test_a_finished_run_without_its_checkpoints_is_not_begun_anew(config: Path, tmp_path: Path) -> None:
    """As versions left it that did not record their commits."""
    run = tmp_path / "run"
    assert train(config).returncode == 0
    (run / "committed.json").unlink()
    shutil.move(run / "checkpoints", tmp_path / "elsewhere")
    _told(train(config), "holds no checkpoint, and ", "exit.json says that this run has saved some")
    shutil.move(tmp_path / "elsewhere", run / "checkpoints")
    assert train(config).returncode == 0
    assert (run / "committed.json").is_file()


def test_a_start_leaves_what_other_tools_are_writing(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("hf.7.partial", "metrics.jsonl.7.partial"):
        (run / name).mkdir(parents=True)
    assert train(config).returncode == 0
    assert (run / "hf.7.partial").is_dir()
    assert not (run / "metrics.jsonl.7.partial").exists()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    _told(train(config, "--train.output_dir", tmp_path / "link"), "a link to ", "which is not there. Mount its disk")


def test_a_model_that_no_memory_holds(config: Path) -> None:
    done = train(config, "--model.hidden_size", 2**20, "--model.ffn_hidden_size", 2**22)
    _told(done, "the model does not fit into the memory of a rank", "megatron-med plan says what a rank needs")
    _told(train(config, "--model.num_layers", 10**9), "model.num_layers is 1000000000: it must be at most 65536")


def test_weights_that_are_not_numbers_choose_no_token(config: Path, tmp_path: Path) -> None:
    done = python("-c", _BREAK_WEIGHTS, config, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for options in ((), ("--temperature", 1), ("--temperature", 1, "--top-p", 0.5, "--top-k", 3)):
        arguments = ("--checkpoint", tmp_path / "run", "--prompt-ids", 1, 2, *options)
        _told(python("tools/generate.py", *arguments), "weights that are not finite (", "Choose another checkpoint")


_BREAK_WEIGHTS = """
import sys, torch
from megatron_med.optim.optimizer import Optimizer
step = Optimizer.step
def broken(self, *arguments):
    step(self, *arguments)
    for item in self.owned:
        item.master.fill_(float("nan"))
Optimizer.step = broken
from megatron_med.train.__main__ import main
sys.exit(main([sys.argv[1], "--train.output_dir", sys.argv[2], "--train.steps", "1"]))
"""


def _rewrite(step: Path, state: bytes) -> None:
    """Another ``state.json``, with its checksum."""
    (step / "state.json").write_bytes(state)
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"] |= describe_files(step, ["state.json"])
    (step / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("utf8", ["", "0"])
def test_prompts_where_no_locale_is_set(config: Path, tmp_path: Path, utf8: str) -> None:
    """Python reads the command line as UTF-8 there, unless it is told not to."""
    assert train(config).returncode == 0
    arguments = ["tools/generate.py", "--checkpoint", str(tmp_path / "run"), "--max-new-tokens", "2", "--prompt"]
    env = environment() | {"LC_ALL": "C", "PYTHONUTF8": utf8}
    for prompt, code in (("Fièvre à 39 °C".encode(), 0), (b"fever \xff", 2)):
        command = [sys.executable.encode(), *(word.encode() for word in arguments), prompt]
        done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, timeout=TIMEOUT, check=False)
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr
        if code:
            assert b"error: --prompt is not UTF-8 text (byte 6)" in done.stderr
        else:
            assert done.stdout.startswith(prompt if not utf8 else b"Fi\\xe8vre \\xe0 39 \\xb0C")
