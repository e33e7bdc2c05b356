"""tools/plan.py as a user runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.cli.processes import python, real_python

RECIPE = "examples/gap_replay/70b.yaml"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """7B cut for eight GPUs."""
    tree = {
        "model": {"preset": "llama2-7b"},
        "parallel": {"tensor": 8},
        "data": {"sequence_length": 2048, "train": [{"path": "none"}]},
        "train": {"steps": 1, "micro_batch_size": 2, "global_batch_size": 8, "output_dir": "RUN"},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_the_plan_of_the_reference_run() -> None:
    done = real_python("tools/plan.py", RECIPE, "--cluster", "a100-80g:16x8", "--nics", 1)
    assert done.returncode == 0, done.stderr
    assert "112-127" in done.stdout
    assert "\nplanned in " in done.stdout
    exact = ("--model.vocab_size", 32000)
    done = python("tools/plan.py", RECIPE, "--cluster", "a100-80g:16x8", "--json", *exact)
    assert json.loads(done.stdout)["parameters"] == 68_976_648_192


def test_a_plan_that_does_not_fit_ends_with_1(small: Path) -> None:
    done = python(
        "tools/plan.py", small, "--cluster", "a100-40g:1x8", "--train.micro_batch_size", 8, "--parallel.tensor", 1
    )
    assert done.returncode == 2
    assert "train.global_batch_size is 8" in done.stderr
    tight = ("--parallel.tensor", 1, "--parallel.sharding", "none", "--train.micro_batch_size", 1)
    done = python("tools/plan.py", small, "--cluster", "a100-40g:1x8", *tight)
    assert done.returncode == 1, done.stderr
    assert "does not fit" in done.stdout


def test_the_search_takes_a_configuration_that_was_cut_for_another_cluster(small: Path) -> None:
    done = real_python("tools/plan.py", small, "--cluster", "h200:1x2", "--search", "--top", 2, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {(size["tensor"], size["pipeline"]) for size in result["sizes"]} == {(1, 1), (1, 2), (2, 1)}
    assert 1 <= len(result["best"]) <= 2
    assert all(found["fits"] for found in result["best"])


@pytest.mark.parametrize(
    ("config", "cluster", "message"),
    [
        ("small", "a100:1x8", "the kind 'a100' is unknown. Known: a100-80g"),
        ("small", "a100-80g:1x6", "The world size is 6"),
        ("none", "a100-80g:1x8", "no configuration file"),
    ],
)
def test_refusals_are_quick_and_say_what_is_wrong(small: Path, config: str, cluster: str, message: str) -> None:
    """Quick: none of them imports torch."""
    path = small.with_name(f"{config}.yaml")
    done = real_python("-X", "importtime", "tools/plan.py", path, "--cluster", cluster)
    assert done.returncode == 2
    assert message in done.stderr
    assert re.search(r"\| +megatron_med\.config$", done.stderr, re.MULTILINE), "the imports are not listed"
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)
