"""Reports of evaluations, contamination, comparisons: on files that the tools write, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_med.checkpoint.huggingface.convert import import_huggingface
from tests.cli.processes import python
from tests.small_models import write_small_llama

COMPARE = "tools/compare_results.py"
LETTERS = "ABCD"
SUBJECTS = ("Fevers", "Rashes & more", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_tokenizer: Path) -> Path:
    """Two checkpoints, 120 questions, and training text in which every tenth of them is planted."""
    folder = tmp_path_factory.mktemp("reports")
    for seed in (1, 2):
        import_huggingface(write_small_llama(folder / f"hf{seed}", sample_tokenizer, seed), folder / f"model{seed}")
    words = [f"{first}{last}" for first in "bdfgklmnprst" for last in ("alin", "ido", "oxan", "umab")]
    rows = [
        {
            "id": f"q{number}",
            "question": f"A patient takes {words[number % 48]} with {words[(7 * number + 5) % 48]} for {number} days, "
            f"and has a {words[(11 * number + 3) % 48]} reaction after {number % 7} hours. What now?",
            "options": {letter: f"Give {'more ' * place}{number}" for place, letter in enumerate(LETTERS)},
            "answer_idx": LETTERS[number % 4],
            "meta_info": "step1",
        }
        for number in range(120)
    ]
    (folder / "medqa_4opt_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "medqa_4opt_half.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:60]))
    lines = []
    for number, row in enumerate(rows):
        text = f"Some patients take {words[number % 48]} for {number} days, and others do not."
        if number % 10 == 0:
            planted = re.sub(" ", "  ", row["question"].upper()).replace("?", " ?!")
            text += f" Exam:\n{planted} {row['options']}"
        lines.append(json.dumps({"id": str(number), "text": text}) + "\n")
    (folder / "training.jsonl").write_text("".join(lines))
    return folder


def _evaluate(folder: Path, output: str, *options: object, model: int = 1) -> dict[str, Any]:
    arguments = ("--checkpoint", folder / f"model{model}", "--output", folder / output, "--truncate", "left")
    tasks = () if "--tasks" in options else ("--tasks", f"medqa_4options={folder / 'medqa_4opt_test.jsonl'}")
    done = python("tools/evaluate.py", *arguments, *tasks, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {folder / output / 'report.html'}"
    return json.loads((folder / output / "results.json").read_text())


@pytest.fixture(scope="module")
def tokens(folder: Path, sample_tokenizer: Path) -> Path:
    """The training text as token files."""
    arguments = ("--input", folder / "training.jsonl", "--output-prefix", folder / "tokens", "--append-eod")
    done = python("tools/preprocess_data.py", *arguments, "--tokenizer", sample_tokenizer, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return folder / "tokens"


def test_planted_questions_are_found_and_no_others(folder: Path, tokens: Path) -> None:
    """In capitals and with other spaces; in text, in token files, and in the data of a run."""
    planted = {f"q{number}" for number in range(0, 120, 10)}
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(f"data:\n  train:\n  - path: {tokens}\n")
    for where in (folder / "training.jsonl", tokens, folder / "run"):
        content = _evaluate(folder, "contaminated", "--contamination", where)
        known = content["contamination"]["medqa_4options"]
        assert set(known["found"]) == planted
        assert known["too_short_to_be_sought"] == 0
        told = content["analysis"]["medqa_4options"]["letter"]
        assert told["clean"]["count"] == 108
    place = "training.jsonl:11" if where.suffix else "document 10"
    assert place in known["found"]["q10"]["place"]
    samples = (folder / "contaminated" / "samples_medqa_4options.jsonl").read_text().splitlines()
    assert len(samples) == 120  # no question was asked again
    hits = [one["prediction"] == one["gold"] for one in map(json.loads, samples) if one["id"] not in planted]
    assert told["clean"]["value"] == pytest.approx(sum(hits) / 108)


def test_a_report_is_one_page_that_a_browser_shows(folder: Path) -> None:
    ways = ("--score", "letter", "option", "--orders", 3, "--contamination", folder / "training.jsonl")
    content = _evaluate(folder, "page", *ways)
    table, told = content["tasks"]["medqa_4options"], content["analysis"]["medqa_4options"]
    assert {"letter@1", "letter@2", "option.sum@2"} <= table.keys()
    assert not any("@3" in metric for metric in table)
    assert told.keys() == {"letter", "option.sum", "option.per_character", "option.per_token"}
    assert told["letter"]["order"]["orders"] == 3
    assert told["letter"]["order"]["values"][1] == table["letter@1"]["value"]
    assert sum(count for *_, count in told["letter"]["calibration"]["bins"]) == 120
    assert sum(part["count"] for part in told["letter"]["lengths"]) == 120
    assert "calibration" not in told["option.per_token"]
    assert told["letter"]["selective"]["abstain"]["test"] >= 40
    page = (folder / "page" / "report.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"']?https?:", page)
    assert page.count("<svg") == 3
    for words in ("Calibration", "Selective answering", "By length", "By order", "Contamination", "Wrong answers"):
        assert words in page
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
    profile = f"--user-data-dir={folder / 'profile'}"
    shown = subprocess.run(
        [*command, profile, (folder / "page" / "report.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("</svg>") == 3
    assert f"{table['letter']['value']:.4f}" in shown.stdout


def test_runs_are_compared_on_the_same_questions_with_what_was_published(folder: Path) -> None:
    for number in (1, 2):
        _evaluate(folder, f"scores/{number}", model=number)
    out = folder / "comparison"
    done = python(COMPARE, folder / "scores/1", folder / "scores/2", "--output", out)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((out / "comparison.json").read_text())
    rights = []
    for number in (1, 2):
        lines = (folder / f"scores/{number}" / "samples_medqa_4options.jsonl").read_text().splitlines()
        rights.append([one["prediction"] == one["gold"] for one in map(json.loads, lines)])
    (test,) = numbers["tests"]
    assert test["only_first"] == sum(a and not b for a, b in zip(*rights, strict=True))
    assert test["only_second"] == sum(b and not a for a, b in zip(*rights, strict=True))
    assert 0 < test["p"] <= 1
    text = (out / "comparison.md").read_text()
    assert "| Meditron-70B | fine-tuned, top-token (--score top_token) | 0.654 |" in text
    assert "| BioMedLM-2.7B | fine-tuned, a linear score of each option | 0.503 |" in text
    assert f"| 1 | letter | {sum(rights[0]) / 120:.4f} (" in text
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    again = python(COMPARE, folder / "scores/1", "--output", out)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_what_cannot_be_compared_or_searched_is_a_message(folder: Path, tokens: Path, tmp_path: Path) -> None:
    _evaluate(folder, "whole")
    _evaluate(folder, "half", "--tasks", f"medqa_4options={folder / 'medqa_4opt_half.jsonl'}")
    _evaluate(folder, "limited", "--limit", 30)
    shutil.copytree(folder / "limited", tmp_path / "bare")
    (tmp_path / "bare" / "samples_medqa_4options.jsonl").unlink()
    (tmp_path / "empty").mkdir()

    def refused(*arguments: object) -> str:
        done = python(COMPARE, *arguments, "--output", tmp_path / "out")
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()
        return done.stderr

    assert "120 questions" in refused(folder / "whole", folder / "half")
    assert "30 of them the same" in refused(folder / "whole", folder / "limited")
    assert "Copy the whole folder" in refused(folder / "limited", tmp_path / "bare")
    assert "name its --output folder" in refused(folder / "whole", tmp_path / "empty")
    assert "named twice" in refused(folder / "whole", folder / "whole")

    def not_searched(where: Path, message: str) -> None:
        task = f"medqa_4options={folder / 'medqa_4opt_test.jsonl'}"
        options = ("--checkpoint", folder / "model1", "--tasks", task, "--output", tmp_path / "new")
        done = python("tools/evaluate.py", *options, "--contamination", where)
        assert done.returncode == 2
        assert message in done.stderr

    not_searched(tmp_path / "empty", "no RUN, no prefix of token files")
    text = ("--input", folder / "training.jsonl")
    other = ("--vocab-size", 300, "--output", tmp_path / "tokenizer")
    assert python("tools/train_tokenizer.py", *text, *other).returncode == 0
    files = ("--output-prefix", tmp_path / "other", "--tokenizer", tmp_path / "tokenizer")
    assert python("tools/preprocess_data.py", *text, *files).returncode == 0
    not_searched(tmp_path / "other", "made with another tokenizer")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("data:\n  train:\n  - path: gone/tokens\n")
    not_searched(run, "gone/tokens, which is not there")


def test_a_report_speaks_of_questions_and_not_of_draws(folder: Path) -> None:
    """Behind several draws of examples: lengths without the examples, one answer a question, orders of one draw."""
    training = folder / "medqa_4opt_half.jsonl"
    rows = [json.loads(line) | {"id": f"t{n}", "question": f"Is {n} it?"} for n, line in enumerate(training.open())]
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shots = ("--shots", 2, "--shots-from", folder / "examples.jsonl", "--orders", 3, "--score", "letter")
    once = _evaluate(folder, "once", *shots, "--seeds", 1)
    thrice = _evaluate(folder, "thrice", *shots, "--seeds", 1, 2, 3)
    first, all_of_them = (one["analysis"]["medqa_4options"]["letter"] for one in (once, thrice))
    for name in ("lengths", "calibration", "order", "selective"):
        assert all_of_them[name] == first[name]
    assert max(part["words"][1] for part in first["lengths"]) < 60
    many = _evaluate(folder, "many", "--orders", 9, "--limit", 4)
    assert many["analysis"]["medqa_4options"]["letter"]["order"]["orders"] == 4


def test_what_was_looked_up_is_forgotten_where_other_questions_are_asked(folder: Path) -> None:
    _evaluate(folder, "grows", "--limit", 40, "--contamination", folder / "training.jsonl")
    content = _evaluate(folder, "grows")
    assert "clean" not in content["analysis"]["medqa_4options"]["letter"] or (
        content["analysis"]["medqa_4options"]["letter"]["clean"]["count"] < 40
    )
    further = _evaluate(folder, "grows", "--score", "option", "--contamination", folder / "training.jsonl")
    assert further["analysis"]["medqa_4options"]["option.sum"]["clean"]["count"] == 108


def test_a_refused_command_leaves_the_results(folder: Path) -> None:
    _evaluate(folder, "kept", "--limit", 10)
    before = (folder / "kept" / "results.json").read_bytes()
    task = ("--tasks", f"medqa_4options={folder / 'medqa_4opt_test.jsonl'}", "--checkpoint", folder / "model1")
    for options in (("--contamination", folder / "none"), ("--score", "head")):
        done = python("tools/evaluate.py", *task, "--output", folder / "kept", "--overwrite", *options)
        assert done.returncode == 2
        assert (folder / "kept" / "results.json").read_bytes() == before
    content = json.loads(before)
    content["tasks"]["medqa_4options"]["letter"].pop("interval")
    shutil.copytree(folder / "kept", folder / "broken")
    (folder / "broken" / "results.json").write_text(json.dumps(content))
    shutil.copytree(folder / "kept", folder / "bare")
    lines = [json.loads(line) for line in (folder / "kept" / "samples_medqa_4options.jsonl").open()]
    for line in lines:
        line.pop("prompt")
    (folder / "bare" / "samples_medqa_4options.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, message in (("broken", "holds no results.json"), ("bare", "without their prompts")):
        done = python(COMPARE, folder / "kept", folder / name, "--output", folder / "never")
        assert done.returncode == 2
        assert message in done.stderr
