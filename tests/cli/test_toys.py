"""The four systems at toy size, from raw text to a table beside the published one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_med.corpus.contamination import QuestionSearch, simplified_words, what_tells
from tests.cli.forked_python import forked_python, with_python_of
from tests.conftest import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
SYSTEMS = {
    "gap_replay": ("Meditron-70B", ("medqa", "medmcqa"), {"base", "meditron", "answers", "thoughts"}),
    "biomedlm": (
        "BioMedLM-2.7B",
        ("medqa_4options", "pubmedqa", "bioasq", "meqsum"),
        {"biomedlm", "medqa-head", "pubmedqa-head", "bioasq-head", "summaries"},
    ),
    "biomed_llama": (
        "BioMed-LLaMA-7B",
        ("medqa_4options", "pubmedqa", "pubmed_abstracts_perplexity"),
        {"base", "continued", "mixture_a", "mixture_b", "one_task"},
    ),
    "medalpaca": (
        "MedAlpaca-7B LoRA 8-bit",
        ("usmle_step1", "usmle_step2", "usmle_step3"),
        {"base", "alpaca", *(f"medalpaca_7b{way}" for way in ("", "_lora", "_lora_int8", "_lora_nf4"))},
    ),
}

WITHOUT_COMPILER = "medalpaca"
NOT_BUILT = """\
import sys


class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.startswith("_megatron_med_") else self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Without, sys.meta_path)
"""
"""What an environment without a compiler is like: neither extension is there."""


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_goes_from_raw_text_to_its_table(system: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    published, tasks, runs = SYSTEMS[system]
    built = system != WITHOUT_COMPILER
    command = ["bash", str(EXAMPLES / system / "toy.sh"), "--output", str(tmp_path / "out")]
    with ExitStack() as stack:
        if built:
            environment = request.getfixturevalue("forked_environment")
        else:
            (tmp_path / "sitecustomize.py").write_text(NOT_BUILT)
            environment = os.environ | {"PYTHONPATH": str(tmp_path)}
            environment |= with_python_of(stack.enter_context(forked_python(environment)))
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for extension in ("_megatron_med_index", "_megatron_med_kernels"):
        assert (f"{extension} was not built, for lack of a compiler" in done.stdout) == (not built)
    out = tmp_path / "out"
    assert {path.name for path in (out / "runs").iterdir()} == runs
    assert done.stdout.count(": loss ") == len(runs)
    numbers = json.loads((out / "comparison" / "comparison.json").read_text())
    ours = {task for row in numbers["rows"] if not row["system"] for task in row["cells"]}
    assert ours == set(tasks)
    assert any(row["name"] == published for row in numbers["rows"] if row["system"])
    for results in (out / "results").iterdir():
        assert (results / "report.html").is_file()


def test_without_a_compiler_the_installation_goes_on_and_says_so(tmp_path: Path) -> None:
    folders = ("--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib")
    command = [sys.executable, "setup.py", "-q", "build_ext", *map(str, folders)]
    environment = os.environ | {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for extension in ("_megatron_med_index", "_megatron_med_kernels"):
        assert f"{extension} was not built, plain Python serves" in done.stderr
    assert not list(tmp_path.glob("lib/*.so"))


def test_a_loss_that_does_not_fall_ends_the_script(tmp_path: Path) -> None:
    def ended(losses: list[float]) -> subprocess.CompletedProcess[str]:
        lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        command = [sys.executable, str(EXAMPLES / "toy" / "falls.py"), str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert ended([3.0, 2.5, 2.6, 2.0, 1.9]).returncode == 0
    for flat in ([3.0, 3.0, 3.0], [2.0, 1.0, 3.0], [2.0, float("nan")]):
        done = ended(flat)
        assert done.returncode == 1
        assert "did not fall" in done.stderr


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_toy_recipe_trains_on_a_scored_question(system: str) -> None:
    """Each has twenty to train on and twenty others to be scored on."""
    texts = {"train": set(), "test": set()}
    for path in (EXAMPLES / system / "toy").iterdir():
        split = "train" if "train" in path.name or path.name in ("alpaca.json", "meadow.json") else "test"
        if path.suffix in (".jsonl", ".json") and "solutions" not in path.name:
            content = path.read_text(encoding="utf-8")
            rows = (
                [json.loads(line) for line in content.splitlines()] if path.suffix == ".jsonl" else json.loads(content)
            )
            for row in rows.values() if isinstance(rows, dict) else rows:
                texts[split].add(row.get("question") or row.get("QUESTION") or row["instruction"] + row["input"])
    assert len(texts["train"]) >= 20
    assert len(texts["test"]) >= 20
    assert not texts["train"] & texts["test"]
    sought = what_tells(([text] for text in sorted(texts["test"])), 13)
    search = QuestionSearch()
    for gram in sought.grams:
        search.seek_gram(system, 0, gram, 13)
    for text in sought.whole:
        search.seek_whole(system, 0, text)
    assert not [found for text in texts["train"] for found in search.hits(simplified_words(text))]
