"""The benchmarks run, at sizes that say nothing about speed, and what they measure becomes tables and a picture."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.processes import REPOSITORY, TIMEOUT, environment, python, started_ranks

FOLDER = "tools/benchmark"
TINY = ("--preset", "llama-tiny", "--sequence-length", 16, "--micro-batch-size", 1, "--steps", 2)


def _rows(file: Path, name: str) -> list[dict[str, Any]]:
    result = json.loads(file.read_text(encoding="utf-8"))["results"][name]
    assert result["name"] == name
    return result["rows"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a training step and its peers."""
    file = tmp_path_factory.mktemp("benchmarks") / "new" / "b.json"
    peers = ("--peers", "transformers", "litgpt", "--no-memory")
    done = python(f"{FOLDER}/throughput.py", *TINY, *peers, "--json", file)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = _rows(file, "step llama-tiny fp32")
    assert [row["contestant"] for row in rows][:2] == ["megatron_med", "transformers"]
    assert rows[0]["ratio"] == 1
    assert all(row["tokens/s"] == pytest.approx(16e3 / row["ms"]) for row in rows[:-1])
    assert len(rows) == 4 or "left out: litgpt, not installed: pip install 'megatron_med[peers]'" in done.stdout
    return file


def test_a_file_becomes_tables_and_a_picture(measured: Path, tmp_path: Path) -> None:
    told = python(f"{FOLDER}/report.py", measured).stdout
    assert "### step llama-tiny fp32" in told
    assert "| megatron_med |" in told
    picture = tmp_path / "images" / "step.svg"
    done = python(f"{FOLDER}/picture.py", measured, "--output", picture)
    assert done.returncode == 0, done.stderr
    assert "nothing but products" in picture.read_text(encoding="utf-8")
    first = picture.read_bytes()
    python(f"{FOLDER}/picture.py", measured, "--output", picture)
    assert picture.read_bytes() == first, "the same file gives the same picture"


def test_a_file_without_a_step_gives_no_picture(tmp_path: Path) -> None:
    file = tmp_path / "empty.json"
    file.write_text('{"machine": {}, "results": {}}')
    done = python(f"{FOLDER}/picture.py", file, "--output", tmp_path / "x.svg")
    assert done.returncode == 2
    assert "holds no training step: run tools/benchmark/throughput.py --json first" in done.stderr


def test_kernels_are_measured_against_torch_and_a_copy(tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    done = python(f"{FOLDER}/kernels.py", "--kilobytes", 64, "--rounds", 2, "--threads", 1, "--json", file)
    if "The C++ kernels are not installed" in done.stderr:
        pytest.skip("csrc/kernels is not built")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = _rows(file, "kernels fp32 64000")
    assert {row["kernel"].rpartition(" ")[2] for row in rows} == {"forward", "backward"}
    assert all(row["GB/s"] > 0 and row["of copy"] > 0 and row["times torch"] > 0 for row in rows)


def test_attention_is_measured_against_torch_and_a_product(tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    tiny = ("--tokens", 32, "--heads", 2, "--groups", 1, "--rounds", 2, "--threads", 1)
    done = python(f"{FOLDER}/attention.py", "--sequence-lengths", 16, 32, *tiny, "--json", file)
    if "The C++ kernels are not installed" in done.stderr:
        pytest.skip("csrc/kernels is not built")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = _rows(file, "attention")
    assert [(row["sequence"], row["direction"]) for row in rows[1:3]] == [(16, "backward"), (32, "forward")]
    assert all(row["ms"] > 0 and row["times torch"] > 0 and 0 < row["of products"] < 1 for row in rows)
    done = python(f"{FOLDER}/attention.py", "--sequence-lengths", 64, *tiny)
    assert (done.returncode, done.stderr) == (2, "error: --sequence-lengths must lie between 1 and --tokens.\n")


def test_schedules_are_compared_with_what_the_simulator_says(tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    script = (f"{FOLDER}/schedules.py", *TINY, "--micro-batches", 4, "--json", file)
    with started_ranks(range(2), 2, *script) as processes:
        for process in processes:
            assert process.wait(TIMEOUT) == 0, process.output()[-2000:]
    rows = _rows(file, "schedules llama-tiny fp32")
    assert [row["contestant"] for row in rows] == ["gpipe", "1f1b", "interleaved", "zero_bubble"]
    for row in rows:
        assert row["predicted ms"] > 0
        assert 0 < row["idle"] < 1
    done = python(*script)
    assert done.returncode == 2
    assert "A pipeline has two stages at least: start it with torchrun --nproc-per-node 2" in done.stderr


def test_all_are_called_with_options_that_they_take(tmp_path: Path) -> None:
    """``all.sh`` with a python that only writes down what it is asked for."""
    log, name = tmp_path / "log", tmp_path / "bin" / "python"
    name.parent.mkdir()
    name.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    name.chmod(0o755)
    env = environment() | {"PATH": f"{name.parent}:{os.environ['PATH']}"}
    script = ["bash", str(REPOSITORY / FOLDER / "all.sh"), str(tmp_path / "b.json")]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert "has failed" not in done.stderr
    asked: dict[str, set[str]] = {}
    for line in log.read_text().splitlines():
        before, called, after = line.partition(".py ")
        if not called:
            continue  # a question about the processor
        options = asked.setdefault(f"{before.split()[-1]}.py", set())
        options |= {word for word in after.split() if word.startswith("--")}
    measured = {Path(path).stem for path in asked}
    assert {"throughput", "kernels", "attention", "schedules", "overlap", "scaling", "saving", "conversion"} <= measured
    assert {"generation", "preprocessing", "index", "loader", "tuning"} <= measured
    for path, options in asked.items():
        told = python(path, "--help").stdout
        assert not {option for option in options if f"{option} " not in told and f"{option}]" not in told}, path


@pytest.mark.slow
def test_scaling_starts_its_ranks(tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    size = ("--preset", "llama-tiny", "--sequence-length", 16, "--micro-batch-size", 1, "--steps", 1, "--rounds", 1)
    done = python(f"{FOLDER}/scaling.py", *size, "--ranks", 1, 2, "--json", file)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = _rows(file, "weak scaling llama-tiny fp32")
    assert [row["ranks"] for row in rows] == [1, 2], done.stdout
    assert rows[0]["of one rank's"] == 1
