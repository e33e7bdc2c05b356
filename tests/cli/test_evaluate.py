"""tools/evaluate.py and python -m megatron_med.evaluate: kills, grids, other models, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_med.checkpoint.huggingface.convert import import_huggingface
from tests.cli.processes import python, started_forked, started_ranks
from tests.small_models import write_small_llama

EVALUATE = "tools/evaluate.py"
LETTERS = "ABCD"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, sample_tokenizer: Path) -> Path:
    """A checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("model")
    import_huggingface(write_small_llama(folder / "hf", sample_tokenizer, 1), folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 questions, 20 to draw examples from, and texts."""
    folder = tmp_path_factory.mktemp("questions")
    for split, count in (("test", 300), ("train", 20)):
        rows = [
            {
                "id": f"{split}-{number}",
                "question": f"Patient {split} {number} has a fever {'and more ' * (20 * (number % 3))}. What now?",
                "options": {letter: f"Give {'more ' * place}{number}" for place, letter in enumerate(LETTERS)},
                "answer_idx": LETTERS[number % 4],
            }
            for number in range(count)
        ]
        (folder / f"medqa_4opt_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"id": str(number), "text": "A fever of 39 degrees. " * (1 + number)} for number in range(12)]
    (folder / "abstracts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


def _run(model: Path, data: Path, output: Path, *options: object) -> dict[str, Any]:
    arguments = ("--checkpoint", model, "--data", data, "--output", output, "--tasks", "medqa_4options", *options)
    done = python(EVALUATE, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "results.json").read_text())


def _samples(output: Path, task: str = "medqa_4options") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / f"samples_{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_killed_evaluation_goes_on_and_asks_no_question_twice(model: Path, data: Path, tmp_path: Path) -> None:
    ways = ("--score", "letter", "option", "top_token")
    whole = _run(model, data, tmp_path / "whole", *ways)
    out = tmp_path / "out"
    arguments = ("--checkpoint", model, "--data", data, "--output", out, "--tasks", "medqa_4options", *ways)
    command = [EVALUATE, *map(str, arguments)]
    samples = out / "samples_medqa_4options.jsonl"
    with started_forked(command) as process:
        deadline = time.monotonic() + 120
        while not (samples.exists() and samples.read_bytes().count(b"\n") >= 428):  # the second way has begun
            assert process.poll() is None, process.output()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
    stood = samples.read_bytes().count(b"\n")
    assert 428 <= stood < 900, "the kill came in the middle"
    with samples.open("ab") as file:
        file.write(b'{"id": "test-299", "sco')
    done = python(*command)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "results.json").read_text()) == whole
    keys = [(sample["id"], sample["score"]) for sample in _samples(out)]
    assert len(keys) == len(set(keys)) == 900
    assert sorted(map(json.dumps, _samples(out))) == sorted(map(json.dumps, _samples(tmp_path / "whole")))
    before = samples.stat().st_mtime_ns
    assert python(*command).returncode == 0
    assert samples.stat().st_mtime_ns == before, "nothing is asked again"


def test_results_say_what_they_count(model: Path, data: Path, tmp_path: Path) -> None:
    results = _run(model, data, tmp_path / "r", "--score", "option", "top_token", "--limit", 40)
    assert results["gold"] == {"medqa_4options": dict.fromkeys(LETTERS, 10)}
    table = results["tasks"]["medqa_4options"]
    assert set(table) == {"option.sum", "option.per_character", "option.per_token", "top_token"}
    samples = _samples(tmp_path / "r")
    options = [sample for sample in samples if sample["score"] == "option"]
    by_hand = sum(
        LETTERS[max(range(4), key=sample["loglikelihoods"].__getitem__)] == sample["gold"] for sample in options
    )
    assert table["option.sum"]["value"] == by_hand / 40
    low, high = table["option.sum"]["interval"]
    assert low <= by_hand / 40 <= high
    written = [sample for sample in samples if sample["score"] == "top_token"]
    assert table["top_token"]["unparsed"] == sum(not sample["parsed"] for sample in written)
    assert {"id", "prompt", "outputs", "prediction", "gold", "parsed"} <= written[0].keys()
    assert {"id", "prompt", "loglikelihoods", "prediction", "gold", "parsed"} <= options[0].keys()
    more = _run(model, data, tmp_path / "r", "--score", "letter", "--limit", 40)
    assert set(more["tasks"]["medqa_4options"]) == {*table, "letter"}, "a further way joins what stands"


def test_a_grid_gives_the_same_results(model: Path, data: Path, tmp_path: Path) -> None:
    options = ("--score", "letter", "medalpaca", "--limit", 8)
    expected = _run(model, data, tmp_path / "one", *options)
    arguments = ("--checkpoint", model, "--data", data, "--output", tmp_path / "four", "--tasks", "medqa_4options")
    grid = ("--tensor", 2)
    with started_ranks(range(4), 4, EVALUATE, *arguments, *grid, *options) as processes:
        for process in processes:
            assert process.wait(200) == 0, process.output()
        assert sum("medqa_4options (gold answers: " in process.output() for process in processes) == 1, "rank 0 tells"
    results = json.loads((tmp_path / "four" / "results.json").read_text())
    assert results["settings"] == expected["settings"]
    assert results["gold"] == expected["gold"]
    theirs = {(sample["id"], sample["score"]): sample for sample in _samples(tmp_path / "four")}
    for sample in _samples(tmp_path / "one"):
        other = theirs[sample["id"], sample["score"]]
        if "loglikelihoods" in sample:
            assert other["loglikelihoods"] == pytest.approx(sample["loglikelihoods"], abs=1e-4)
        else:
            assert other == sample, "sampled text does not depend on the grid"


def test_examples_and_seeds(model: Path, data: Path, tmp_path: Path) -> None:
    options = ("--shots", 3, "--score", "letter", "top_token", "--limit", 20)
    table = _run(model, data, tmp_path / "r", *options)["tasks"]["medqa_4options"]
    assert set(table["letter"]["seeds"]) == {"1234", "432", "32"}, "Meditron's"
    prompts = {sample["seed"]: sample["prompt"] for sample in _samples(tmp_path / "r") if sample["score"] == "letter"}
    assert len({prompt.split("Patient test")[0] for prompt in prompts.values()}) == 3
    assert all(prompt.count("Patient train") == 3 for prompt in prompts.values())
    for options, message in (
        (
            ("--shots-from", data / "medqa_4opt_test.jsonl"),
            "300 of its 300 questions are asked, too",
        ),
        (("--shots", 30), "holds 20 questions to draw examples from, and --shots is 30"),
        (("--score", "cot"), "--score cot is asked without examples"),
    ):
        done = python(
            EVALUATE, "--checkpoint", model, "--data", data, "--output", tmp_path / "x", "--tasks", "medqa_4options",
            "--shots", 3, *options,
        )  # fmt: skip
        assert done.returncode == 2
        assert message in done.stderr
        assert not (tmp_path / "x").exists()


def test_questions_longer_than_the_context_are_counted_or_cut(model: Path, data: Path, tmp_path: Path) -> None:
    options = ("--limit", 20, "--max-length", 125, "--score", "letter", "text")
    table = _run(model, data, tmp_path / "r", *options)["tasks"]["medqa_4options"]
    for way in ("letter", "text"):
        assert 0 < table[way]["too_long"] < 20
        assert table[way]["unparsed"] >= table[way]["too_long"]
        assert table[way]["count"] == 20
    cut = _run(model, data, tmp_path / "cut", *options, "--truncate", "left")["tasks"]["medqa_4options"]
    assert all("too_long" not in cut[way] for way in ("letter", "text"))


def test_perplexity_of_texts(model: Path, data: Path, tmp_path: Path) -> None:
    arguments = ("--checkpoint", model, "--data", data, "--output", tmp_path / "r")
    done = python(EVALUATE, *arguments, "--tasks", "pubmed_abstracts_perplexity")
    assert done.returncode == 0, done.stderr
    (table,) = json.loads((tmp_path / "r" / "results.json").read_text())["tasks"].values()
    assert table["word_perplexity"]["words"] == sum(5 * (1 + number) for number in range(12))
    assert table["word_perplexity"]["value"] > 1


def test_what_cannot_be_scored_is_told_in_a_line(
    model: Path, data: Path, tmp_path: Path, sample_tokenizer: Path
) -> None:
    other = write_small_llama(tmp_path / "other", sample_tokenizer, 2)
    _run(model, data, tmp_path / "r", "--limit", 4)
    stood = (tmp_path / "r" / "results.json").read_bytes()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    bare = tmp_path / "bare"
    shutil.copytree(other, bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink(missing_ok=True)
    common = ("--checkpoint", model, "--data", data, "--output", tmp_path / "r", "--tasks", "medqa_4options")
    for options, message in (
        (("--checkpoint", other), "holds results with checkpoint"),
        (("--checkpoint", bare, "--output", tmp_path / "x"), "holds no tokenizer"),
        (("--precision", "bf16"), 'holds results with precision "fp32", not "bf16"'),
        (("--output", tmp_path / "full"), "is not empty and holds no results"),
        (("--tasks", "medqa"), "holds no test file of medqa"),
        (("--tasks", "medq"), "--tasks names 'medq': there are "),
        (("--tasks", f"medqa={data / 'medqa_4opt_test.jsonl'}"), "has 4 options, and medqa has 5"),
        (("--data", tmp_path / "absent"), "there is no such folder"),
        (("--limit", 0), "--limit is 0: it must be at least 1"),
        (("--seeds", 1, 1, "--shots", 1), "--seeds holds a seed twice"),
        (("--tensor", 3), "The world size is 1: --tensor x --pipeline = 3 x 1 ranks are needed, or a multiple"),
    ):
        done = python(EVALUATE, *common, *options)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "r" / "results.json").read_bytes() == stood
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    listed = python(EVALUATE, "--list")
    assert "medqa_4options: github.com/jind11/MedQA" in listed.stdout


def test_lm_evals_own_command_on_two_ranks(model: Path, data: Path, tmp_path: Path) -> None:
    module = ("-m", "megatron_med.evaluate")
    arguments = (
        "--model", "megatron_med", "--model_args", f"checkpoint={model},tensor=2", "--tasks", "local_medqa_4options",
        "--metadata", json.dumps({"data": str(data)}), "--limit", "8", "--output_path", tmp_path / "out",
    )  # fmt: skip
    with started_ranks(range(2), 2, *module, *arguments) as processes:
        for process in processes:
            assert process.wait(200) == 0, process.output()
        tables = [process.output().count("|local_medqa_4options|") for process in processes]
    assert tables == [1, 0], "rank 0 prints"
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(written.read_text())["results"]["local_medqa_4options"]["acc,none"] >= 0


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_overwrite_begins_anew_and_seeds_and_limits_join(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _run(model, data, out, "--limit", 20)
    content = _run(model, data, out, "--limit", 12, "--overwrite")
    assert content["tasks"]["medqa_4options"]["letter"]["count"] == 12
    assert len(_samples(out)) == 12
    shown = _run(model, data, out, "--limit", 5)  # the report speaks of what was asked for
    assert shown["tasks"]["medqa_4options"]["letter"]["count"] == 5
    assert shown["analysis"]["medqa_4options"]["letter"]["lengths"][0]["count"] <= 5
    shots = ("--shots", 2, "--limit", 6, "--score", "letter")
    first = _run(model, data, tmp_path / "seeds", *shots, "--seeds", 1, 2)
    joined = _run(model, data, tmp_path / "seeds", *shots, "--seeds", 7)["tasks"]["medqa_4options"]["letter"]
    assert set(joined["seeds"]) == {"1", "2", "7"}
    assert joined["answers"] == 18
    before = first["tasks"]["medqa_4options"]["letter"]["seeds"]
    assert {seed: joined["seeds"][seed] for seed in before} == before


def test_files_beside_the_test_file_belong_to_the_results(model: Path, tmp_path: Path) -> None:
    options = dict(zip("ABCDE", ("rest", "water", "salt", "heat", "cold"), strict=True))
    rows = [{"no": number, "question": f"What helps {number}?", "options": options} for number in (1, 2, 3)]
    (tmp_path / "step1.json").write_text(json.dumps(rows))
    solutions = tmp_path / "step1_solutions.json"
    solutions.write_text(json.dumps({"1": "A", "2": "B", "3": "C"}))
    arguments = (
        "--checkpoint",
        model,
        "--output",
        tmp_path / "out",
        "--tasks",
        f"usmle_step1={tmp_path / 'step1.json'}",
    )
    assert python(EVALUATE, *arguments).returncode == 0
    solutions.write_text(json.dumps({"1": "B", "2": "B", "3": "C"}))
    refused = python(EVALUATE, *arguments)
    assert refused.returncode == 2
    assert "holds results with files" in refused.stderr
    solutions.write_text('{"1": "B", ')
    assert "step1_solutions.json is not JSON" in python(EVALUATE, *arguments, "--overwrite").stderr


def test_long_texts_are_read_in_passes_of_bounded_size() -> None:
    """All begin with the same single token: no pass may hold more than it should for that."""
    from megatron_med.inference.scoring import TOKENS_AT_ONCE, _passes

    texts = [([1], list(range(2, 2 + 300))) for _ in range(64)]
    shared = [(list(range(500)), [7] * 200) for _ in range(40)]
    for requests in (texts, shared):
        passes = _passes(requests, 1)
        sizes = [
            sum(len(q.context) + sum(len(requests[n][1]) - 1 for n in q.requests) for q in one.questions)
            for one in passes
        ]
        assert max(sizes) <= TOKENS_AT_ONCE
        asked = sorted(number for one in passes for question in one.questions for number in question.requests)
        assert asked == list(range(len(requests)))


def test_what_cannot_be_meant_is_refused_in_a_line(model: Path, data: Path, tmp_path: Path) -> None:
    good = {"id": "1", "question": "What now?", "options": dict(zip("ABCD", "wxyz", strict=True)), "answer_idx": "B"}
    (tmp_path / "train").mkdir()
    shutil.copy(data / "medqa_4opt_train.jsonl", tmp_path / "train")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "bad.csv").write_bytes(b"Category,Question\nHealth,caf\xe9\n")
    (tmp_path / "cut.json").write_text(json.dumps([good, good], indent=1)[:-4])
    twice = _lines(tmp_path / "twice.jsonl", [{"id": 1, "text": "a"}, {"id": 1, "text": "b"}])
    row = {"subject": "anatomy", "question": "Q", "choices": 7, "answer": 0, "split": "test"}
    mmlu = _lines(tmp_path / "mmlu.jsonl", [row])
    cases = {
        "no test file": ("--data", tmp_path / "train", "--tasks", "medqa_4options"),
        "names medqa_4options twice": ("--data", data, "--tasks", "medqa_4options", "medqa_4options=x.jsonl"),
        "a file is missing behind '='": ("--tasks", "medqa_4options="),
        "--seeds holds -1": ("--data", data, "--tasks", "medqa_4options", "--shots", 1, "--seeds", -1),
        "--tensor is -1": ("--data", data, "--tasks", "medqa_4options", "--tensor", -1),
        "the model has 512 positions": ("--data", data, "--tasks", "medqa_4options", "--max-length", 4096),
        "answer the text of another option": (
            "--tasks",
            f"medqa_4options={_lines(tmp_path / 'other.jsonl', [good | {'answer': 'w'}])}",
        ),
        "lone surrogate": (
            "--tasks",
            f"medqa_4options={_lines(tmp_path / 'half.jsonl', [good | {'question': chr(0xD800)}])}",
        ),
        "two documents have the id 1": ("--tasks", f"pubmed_abstracts_perplexity={twice}"),
        "no document with words": (
            "--tasks",
            f"pubmed_abstracts_perplexity={_lines(tmp_path / 'empty.jsonl', [{'id': 1, 'text': ' '}])}",
        ),
        "no Parquet file": ("--tasks", f"medqa_4options={tmp_path / 'bad.parquet'}"),
        "is not UTF-8": ("--tasks", f"truthfulqa={tmp_path / 'bad.csv'}"),
        "is broken JSON": ("--tasks", f"medqa_4options={tmp_path / 'cut.json'}"),
        "cannot be read as mmlu_medical": ("--tasks", f"mmlu_medical={mmlu}"),
    }
    for message, options in cases.items():
        done = python(EVALUATE, "--checkpoint", model, "--output", tmp_path / "out", *options)
        assert done.returncode == 2, (message, done.stderr)
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_typing_error_in_model_args_is_told(model: Path, data: Path) -> None:
    arguments = ("--model", "megatron_med", "--model_args", f"checkpoint={model},precison=bf16")
    metadata = ("--tasks", "local_medqa_4options", "--metadata", json.dumps({"data": str(data)}), "--limit", 2)
    done = python("-m", "megatron_med.evaluate", *arguments, *metadata)
    assert done.returncode == 2
    assert "there is no option precison" in done.stderr
