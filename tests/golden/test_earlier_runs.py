"""Runs, checkpoints and token files written by an earlier version go on as they would have with it.

``checkpoints/two_runs.tar.xz`` was written at commit 8685a10 (version 0.1, 2026-11-25), four ranks each: a Llama under
TP 2 x PP 2 with documents kept apart, and a GPT-2 under PP 2 x DP 2 with tied embeddings and all three dropouts. Both
stand at step 2; ``NAME.expected.jsonl`` holds what that version measured up to step 4.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from megatron_med.checkpoint.storage import Reader
from tests.cli.processes import read_metrics, train, train_on_ranks

RUNS = Path(__file__).parent / "checkpoints" / "two_runs.tar.xz"
GRIDS = {
    "alone": (1, ["--parallel.tensor", "1", "--parallel.pipeline", "1"]),
    "other": (4, ["--parallel.tensor", "2", "--parallel.pipeline", "1", "--parallel.sharding", "full"]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The two runs, their token file where the configuration looks for it."""
    with tarfile.open(RUNS) as archive:
        archive.extractall(tmp_path, filter="data")
    for record in tmp_path.glob("*/run.json"):
        record.write_text(record.read_text().replace('"path": "tokens"', f'"path": "{tmp_path}/tokens"'))
    return tmp_path


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_earlier_run_goes_on(folder: Path, family: str, grid: str) -> None:
    """Names of tensors, optimizer state, order of samples and the names that seed dropout are what they were."""
    ranks, options = GRIDS[grid]
    if family == "gpt2" and grid == "other":  # masks of cut regions follow from the cut
        options = [*options, "--parallel.tensor", "1"]
    run = folder / family
    command = [folder / f"{family}.yaml", *options, "--train.output_dir", run]
    command += ["--data.train", f"[{{path: {folder}/tokens}}]"]
    if ranks == 1:
        done = train(*command)
        assert done.returncode == 0, done.stderr
    else:
        train_on_ranks(ranks, *command)
    expected = [json.loads(line) for line in (folder / f"{family}.expected.jsonl").read_text().splitlines()]
    went_on = read_metrics(run)
    assert [line["step"] for line in went_on] == [1, 2, 3, 4]
    for was, now in zip(expected, went_on, strict=True):
        assert now["loss"] == pytest.approx(was["loss"], rel=2e-5)
        assert now["grad_norm"] == pytest.approx(was["grad_norm"], rel=2e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_names_in_checkpoints_stay(folder: Path, family: str) -> None:
    """A run of today stores the entries of the earlier one, no more and no less."""
    run = folder / "today"
    data = ["--data.train", f"[{{path: {folder}/tokens}}]", "--train.output_dir", run, "--train.steps", "1"]
    done = train(folder / f"{family}.yaml", *GRIDS["alone"][1], *data)
    assert done.returncode == 0, done.stderr
    before = Reader(folder / family / "checkpoints" / "step-00000002").shapes()
    today = Reader(run / "checkpoints" / "step-00000001").shapes()
    assert today == before
