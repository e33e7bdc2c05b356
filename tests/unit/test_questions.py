"""Question files in every form that they come in, and what is wrong with some."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_med.errors import ConfigError, DataError
from megatron_med.evaluate.catalogue import Task, find_file, load_task, read_questions, task_names
from megatron_med.evaluate.questions import Question
from megatron_med.evaluate.readers import MMLU_SUBJECTS, READERS, WITH_PICTURES

MEDQA = {"question": "Which?", "options": {"A": "one", "B": "two", "C": "three", "D": "four"}, "answer_idx": "C"}
MEDMCQA = {"question": "Which?", "opa": "one", "opb": "two", "opc": "three", "opd": "four", "cop": 3, "exp": None}
PUBMED = {"QUESTION": "Is it?", "CONTEXTS": ["One.", "Two."], "final_decision": "maybe", "LONG_ANSWER": "Perhaps."}
MMLU = {"question": "Which?", "subject": "virology", "choices": ["one", "two", "three", "four"], "answer": 2}
TRUTHFUL = {
    "Category": "Health",
    "Question": "Does it help?",
    "Best Answer": "No",
    "Incorrect Answers": "Yes; Always; On Sundays; At night",
}
XPERT = {"id": "Text-1", "question": "Which?", "options": {c: c.lower() for c in "ABCDEFGHIJ"}, "label": "J"}


def _lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _one(task: str, path: Path, split: str = "test") -> Question:
    (question,) = READERS[load_task(task).reader](path, split)
    return question


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "medqa": ("medqa_4options", MEDQA),
    "medqa by its text": ("medqa_4options", {**MEDQA, "answer_idx": None, "answer": "three"}),
    "bigbio source": (
        "medqa_4options",
        {"question": "Which?", "answer": "three", "answer_idx": "C"}
        | {"options": [{"key": key, "value": value} for key, value in MEDQA["options"].items()]},  # type: ignore[union-attr]
    ),
    "bigbio qa": (
        "medqa_4options",
        {"question": "Which?", "choices": ["one", "two", "three", "four"], "answer": ["three"]},
    ),
    "GBaker hf": (
        "medqa_4options",
        {"sent1": "Which?", "ending0": "one", "ending1": "two", "ending2": "three", "ending3": "four", "label": 2},
    ),
    "mmlu": ("mmlu_medical", MMLU),
}


@pytest.mark.parametrize(("task", "record"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".list.json", ".parquet"])
def test_the_same_question_in_every_form(tmp_path: Path, task: str, record: dict[str, Any], ending: str) -> None:
    path = tmp_path / f"file{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), path)
    elif ending == ".list.json":
        path.write_text(json.dumps([record]))
    else:
        _lines(path, record)
    question = _one(task, path)
    assert question.question == "Which?"
    assert dict(question.options) == MEDQA["options"]
    assert question.answer == "C"


@pytest.mark.parametrize(("cops", "letters"), [([1, 4, 3], "ADC"), ([0, 3, 2], "ADC"), ([4], "D"), ([0], "A")])
def test_the_whole_file_tells_from_what_cop_counts(tmp_path: Path, cops: list[int], letters: str) -> None:
    path = _lines(tmp_path / "dev.json", *({**MEDMCQA, "cop": cop, "id": str(n)} for n, cop in enumerate(cops)))
    questions = read_questions(load_task("medmcqa"), "test", path)
    assert "".join(question.answer for question in questions) == letters


def test_gold_answers_of_the_real_files(shared: Path) -> None:
    expected = {
        "medqa_4options": {"A": 185, "B": 142, "C": 158, "D": 138},
        "medmcqa": {"A": 942, "B": 742, "C": 663, "D": 601},
        "pubmedqa": {"yes": 276, "no": 169, "maybe": 55},
    }
    for name, counts in expected.items():
        task = load_task(name)
        questions = read_questions(task, "test", find_file(task, "test", shared / "qa"))
        assert Counter(map(task.gold, questions)) == counts
    mmlu = load_task("mmlu_medical")
    path = find_file(mmlu, "test", shared / "qa")
    assert len(read_questions(mmlu, "test", path)) == 948
    assert len(read_questions(mmlu, "dev", path)) == 45
    assert {question.subject for question in read_questions(mmlu, "test", path)} == set(MMLU_SUBJECTS)
    truthful = load_task("truthfulqa")
    questions = read_questions(truthful, "test", find_file(truthful, "test", shared / "qa"))
    assert Counter(question.subject for question in questions) == {
        "Health": 29,
        "Nutrition": 7,
        "Psychology": 9,
        "Science": 5,
    }
    assert questions == read_questions(truthful, "test", find_file(truthful, "test", shared / "qa")), (
        "no draw without a seed"
    )


def test_pubmedqa_by_pmid_and_the_official_test_split(tmp_path: Path) -> None:
    path = tmp_path / "ori_pqal.json"
    path.write_text(json.dumps({"11": PUBMED, "12": {**PUBMED, "final_decision": "yes"}}))
    task = load_task("pubmedqa")
    questions = read_questions(task, "test", path)
    assert [(question.id, task.gold(question)) for question in questions] == [("11", "maybe"), ("12", "yes")]
    assert questions[0].context == "One.\nTwo."
    (tmp_path / "test_ground_truth.json").write_text(json.dumps({"12": "yes"}))
    assert [question.id for question in read_questions(task, "test", path)] == ["12"]
    (tmp_path / "test_ground_truth.json").unlink()
    hub = {"pubid": 13, "question": "Is it?", "context": {"contexts": ["One.", "Two."]}, "final_decision": "no"}
    (question,) = read_questions(task, "test", _lines(tmp_path / "hub.jsonl", hub))
    assert (question.id, question.context, task.gold(question)) == ("13", "One.\nTwo.", "no")


def test_usmle_leaves_out_what_has_pictures(tmp_path: Path) -> None:
    for step, total, kept in ((1, 119, 92), (2, 120, 110), (3, 135, 122)):
        options = {"A": "one", "B": "two", "C": "three"}
        rows = [{"no": number, "question": f"Which {number}?", "options": options} for number in range(1, total + 1)]
        (tmp_path / f"step{step}.json").write_text(json.dumps(rows))
        solutions = {str(number): "ABC"[number % 3] for number in range(1, total + 1)}
        (tmp_path / f"step{step}_solutions.json").write_text(json.dumps(solutions))
        task = load_task(f"usmle_step{step}")
        questions = read_questions(task, "test", find_file(task, "test", tmp_path))
        assert len(questions) == kept
        pictures = set(WITH_PICTURES[f"step{step}"].split())
        assert not pictures & {question.id for question in questions}
        assert all(question.answer == "ABC"[int(question.id) % 3] for question in questions)
    (tmp_path / "step1_solutions.json").unlink()
    with pytest.raises(DataError, match=r"needs .*step1_solutions.json beside it"):
        read_questions(load_task("usmle_step1"), "test", tmp_path / "step1.json")


def test_truthfulqa_from_its_csv(tmp_path: Path) -> None:
    path = tmp_path / "TruthfulQA.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(TRUTHFUL))
        writer.writeheader()
        writer.writerows([TRUTHFUL, {**TRUTHFUL, "Category": "Law", "Question": "Other?"}])
    question = _one("truthfulqa", path)
    assert question.options[question.answer] == "No"
    assert len(question.options) == 4
    assert set(question.texts) - {"No"} < {"Yes", "Always", "On Sundays", "At night"}


def test_mmlu_from_its_csv_files(tmp_path: Path) -> None:
    for subject in MMLU_SUBJECTS:
        (tmp_path / f"{subject}_test.csv").write_text(f'"{subject}, which?",one,two,"three, or",four,C\n')
    task = load_task("mmlu_medical")
    questions = read_questions(task, "test", find_file(task, "test", tmp_path))
    assert [question.subject for question in questions] == list(MMLU_SUBJECTS)
    assert questions[0].options["C"] == "three, or"


def test_medxpertqa_has_ten_options(tmp_path: Path) -> None:
    question = _one("medxpertqa", _lines(tmp_path / "medxpertqa_test.jsonl", XPERT))
    assert (len(question.options), question.answer) == (10, "J")


BAD: dict[str, tuple[str, list[Any], str]] = {
    "label outside": (
        "medqa_4options",
        [{**MEDQA, "answer_idx": "E"}],
        r"f.jsonl:1: the answer is 'E', and the options are",
    ),
    "label in no option": ("medmcqa", [{**MEDMCQA, "cop": 4}, {**MEDMCQA, "cop": 0}], "f.jsonl:1: the answer is 'E'"),
    "field missing": (
        "medmcqa",
        [{**MEDMCQA, "cop": 4}, {k: v for k, v in MEDMCQA.items() if k != "opc"}],
        "f.jsonl:2: the field opc is",
    ),
    "no cop": ("medmcqa", [{k: v for k, v in MEDMCQA.items() if k != "cop"}], "f.jsonl:1: the field cop is missing"),
    "cop withheld": ("medmcqa", [{**MEDMCQA, "cop": -1}], "f.jsonl:1: cop is -1: this split has no answers"),
    "cop ambiguous": ("medmcqa", [MEDMCQA, {**MEDMCQA, "cop": 2}], "counts from 0 or from 1"),
    "a letter missing": (
        "medqa_4options",
        [{**MEDQA, "options": {"A": "1", "C": "3", "D": "4"}}],
        "not A, B, C: one is",
    ),
    "fewer options": (
        "medqa_4options",
        [{**MEDQA, "options": {"A": "1", "B": "2", "C": "3"}}],
        "has 3 options, and medqa_4op",
    ),
    "one option": (
        "medxpertqa",
        [{**XPERT, "options": {"A": "a"}, "label": "A"}],
        "f.jsonl:1: the question has 1 options",
    ),
    "empty option": ("medqa_4options", [{**MEDQA, "options": {**MEDQA["options"], "B": " "}}], "option B is empty"),  # type: ignore[dict-item]
    "empty question": ("medqa_4options", [{**MEDQA, "question": ""}], "the question is empty"),
    "other decision": ("pubmedqa", [{**PUBMED, "final_decision": "unsure"}], "the answer is 'unsure'"),
    "contexts": ("pubmedqa", [{**PUBMED, "CONTEXTS": "text"}], "CONTEXTS is no list"),
    "no object": ("medqa_4options", ["text"], "f.jsonl:1: it is no object"),
    "empty": ("medqa_4options", [], "holds no question: the split is empty"),
    "no such split": ("mmlu_medical", [{**MMLU, "split": "dev"}], "holds no question of mmlu_medical's split test"),
    "twice": ("medqa_4options", [{**MEDQA, "id": "x"}, {**MEDQA, "id": "x"}], "two questions have the id x"),
    "number": ("mmlu_medical", [{**MMLU, "answer": "two"}], "the field answer is 'two', and should be a whole number"),
}


@pytest.mark.parametrize(("task", "records", "message"), BAD.values(), ids=BAD)
def test_a_file_that_cannot_be_asked_is_refused_by_record(
    tmp_path: Path, task: str, records: list[Any], message: str
) -> None:
    path = _lines(tmp_path / "f.jsonl", *records)
    with pytest.raises(DataError, match=message) as caught:
        read_questions(load_task(task), "test", path)
    assert len(caught.value.faults) == 1


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(json.dumps(MEDQA) + "\n{\n")
    with pytest.raises(DataError, match=r"f.jsonl:2: broken JSON"):
        read_questions(load_task("medqa_4options"), "test", tmp_path / "f.jsonl")


def test_files_are_found_by_their_names(tmp_path: Path) -> None:
    task = load_task("medqa_4options")
    with pytest.raises(DataError, match=r"holds no test file of medqa_4options .* --tasks medqa_4options=FILE"):
        find_file(task, "test", tmp_path)
    _lines(tmp_path / "medqa_4opt_test.jsonl", MEDQA)
    train = _lines(tmp_path / "medqa_4opt_train.jsonl", MEDQA)
    assert find_file(task, "test", tmp_path).name == "medqa_4opt_test.jsonl"
    assert find_file(task, "train", tmp_path) == train
    _lines(tmp_path / "medqa_4opt_other.jsonl", MEDQA)
    with pytest.raises(DataError, match=r"several files of medqa_4options: medqa_4opt_other.jsonl"):
        find_file(task, "test", tmp_path)
    with pytest.raises(DataError, match="there is no such folder"):
        find_file(task, "test", tmp_path / "absent")
    with pytest.raises(ConfigError, match="--tasks names 'medq'"):
        load_task("medq")


@pytest.mark.parametrize("name", task_names())
def test_every_task_says_where_to_get_its_file(name: str) -> None:
    task = load_task(name)
    assert isinstance(task, Task)
    assert task.source
    assert task.files["test"]
    assert task.is_perplexity or task.is_summary or task.reader in READERS
