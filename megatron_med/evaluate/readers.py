"""Question sets in the forms that they are published in, and that the Hugging Face hub has them in. No torch here.

Each reader takes a file of its set and gives its questions. What is filtered out of a set, by whose rule, stands there.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from megatron_med.errors import DataError
from megatron_med.evaluate.questions import Question, checked, lettered
from megatron_med.evaluate.records import Record, read_records

MMLU_SUBJECTS = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "high_school_biology",
    "medical_genetics",
    "nutrition",
    "professional_medicine",
    "virology",
)
"""Meditron's MMLU-Medical."""
TRUTHFULQA_CATEGORIES = ("Health", "Nutrition", "Psychology", "Science")
"""Meditron's."""
WITH_PICTURES = {
    "step1": "4 7 9 11 18 21 30 32 34 36 40 42 44 47 53 56 62 68 77 80 85 88 89 100 105 113 114",
    "step2": "25 26 33 53 60 76 80 87 107 114",
    "step3": "5 21 34 41 63 66 67 88 96 102 113 118 130",
}
"""Numbers of the questions that MedAlpaca leaves out (kbressem/medAlpaca, eval/eval_models.ipynb)."""

Reader = Callable[[Path, str], list[Question]]


def medqa(path: Path, split: str) -> list[Question]:
    """MedQA (Jin et al. 2021), 4 or 5 options: jind11/MedQA, bigbio/med_qa, GBaker/MedQA-USMLE-4-options(-hf)."""
    return [_medqa(record, number) for number, record in enumerate(read_records(path))]


def _medqa(record: Record, number: int) -> Question:
    if "ending0" in record.fields:  # the hub's -hf form
        texts = [record.text(f"ending{place}") for place in range(4)]
        return _question(record, number, record.text("sent1"), lettered(texts), _letter(record, record.number("label")))
    options = _options(record, record.need("options", "choices"))
    answer, text = record.fields.get("answer_idx"), record.fields.get("answer")
    if isinstance(answer, str) and text in options.values() and options.get(answer.strip()) not in (None, text):
        raise DataError(
            f"{record.place}: answer_idx is {answer!r}, and answer the text of another option ({str(text)[:40]!r}). "
            "Correct that record."
        )
    if not isinstance(answer, str):
        answer = record.need("answer")
        answer = answer[0] if isinstance(answer, list) and answer else answer
        answer = next((letter for letter, text in options.items() if text == answer), str(answer))
    return _question(record, number, record.text("question"), options, answer.strip())


def medmcqa(path: Path, split: str) -> list[Question]:
    """MedMCQA (Pal et al. 2022). ``cop`` counts from 1 in the original and from 0 on the hub: the whole file tells."""
    records = read_records(path)
    numbers = [record.number("cop") for record in records]
    if min(numbers) < 0:
        place = records[numbers.index(min(numbers))].place
        raise DataError(f"{place}: cop is {min(numbers)}: this split has no answers. Take the validation split.")
    if not {0, 4} & set(numbers):
        raise DataError(
            f"{path}: cop is {min(numbers)} to {max(numbers)} in all {len(records)} records: nobody can say whether it "
            "counts from 0 or from 1. Give the whole file, which tells."
        )
    first = 0 if 0 in numbers else 1
    pairs = enumerate(zip(records, numbers, strict=True))
    return [_medmcqa(record, index, cop - first) for index, (record, cop) in pairs]


def _medmcqa(record: Record, number: int, answer: int) -> Question:
    options = lettered([record.text(f"op{letter}") for letter in "abcd"])
    explanation = record.fields.get("exp") or ""
    return _question(
        record,
        number,
        record.text("question"),
        options,
        _letter(record, answer),
        subject=record.fields.get("subject_name") or "",
        explanation=explanation,
    )


def pubmedqa(path: Path, split: str) -> list[Question]:
    """PubMedQA, labelled by experts (Jin et al. 2019): ori_pqal.json by PMID, qiaojin/PubMedQA, bigbio's source form.

    Where test_ground_truth.json lies beside the original, only its 500 questions are the test split.
    """
    records = read_records(path)
    official = path.with_name("test_ground_truth.json")
    if split == "test" and official.is_file() and official != path:
        truth = _json_of(official)
        records = [record for record in records if _pubmed_id(record) in truth]
        for record in records:
            if truth[_pubmed_id(record)] != record.fields.get("final_decision"):
                raise DataError(
                    f"{record.place}: final_decision is {record.fields.get('final_decision')!r}, and {official} has "
                    f"{truth[_pubmed_id(record)]!r}. Get both files again."
                )
    return [_pubmedqa(record, number) for number, record in enumerate(records)]


def _pubmed_id(record: Record) -> str:
    return record.key or str(record.fields.get("pubid"))


def _json_of(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}). Get the whole file.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is no object with an answer for each question. Get the whole file.")
    return content


def _pubmedqa(record: Record, number: int) -> Question:
    contexts = record.need("CONTEXTS", "context", "contexts")
    if isinstance(contexts, dict):
        contexts = contexts.get("contexts")
    if not isinstance(contexts, list):
        raise DataError(f"{record.place}: the field CONTEXTS is no list of texts. Correct that record.")
    options = lettered(["yes", "no", "maybe"])
    decision = record.text("final_decision").strip().lower()
    letter = next((letter for letter, text in options.items() if text == decision), decision)
    return _question(
        record,
        number,
        record.text("QUESTION", "question"),
        options,
        letter,
        context="\n".join(map(str, contexts)),
        explanation=record.fields.get("LONG_ANSWER") or record.fields.get("long_answer") or "",
    )


def mmlu_medical(path: Path, split: str) -> list[Question]:
    """MMLU (Hendrycks et al. 2021), nine subjects: records with ``subject``, or the files SUBJECT_SPLIT.csv of which
    ``path`` is one."""
    if path.suffix == ".csv":
        files = [path.with_name(f"{subject}_{split}.csv") for subject in MMLU_SUBJECTS]
        header = ["question", "A", "B", "C", "D", "answer"]
        return [
            _mmlu_row(record, file, number)
            for file in files
            for number, record in enumerate(read_records(file, header))
        ]
    kept = []
    for number, record in enumerate(read_records(path)):
        if record.fields.get("split", split) == split and record.text("subject") in MMLU_SUBJECTS:
            options = lettered(record.need("choices"))
            answer = _letter(record, record.number("answer"))
            kept.append(
                _question(record, number, record.text("question"), options, answer, subject=record.text("subject"))
            )
    return kept


def _mmlu_row(record: Record, file: Path, number: int) -> Question:
    options = {letter: record.text(letter) for letter in "ABCD"}
    subject = file.stem.rpartition("_")[0]
    name = f"{file.stem}-{number}"
    return checked(
        Question(name, record.text("question"), options, record.text("answer"), subject=subject), record.place
    )


def usmle(path: Path, split: str) -> list[Question]:
    """USMLE self-assessment as MedAlpaca has it: stepN.json, the answers in stepN_solutions.json by ``no``; questions
    with pictures are left out."""
    solutions_path = path.with_name(f"{path.stem}_solutions.json")
    if not solutions_path.is_file():
        raise DataError(f"{path} needs {solutions_path} beside it, which has the answers. Get both files.")
    solutions = _json_of(solutions_path)
    pictures = set(map(int, WITH_PICTURES.get(path.stem, "").split()))
    questions = []
    for record in read_records(path):
        number = record.number("no")
        if number in pictures:
            continue
        if str(number) not in solutions:
            raise DataError(f"{record.place}: {solutions_path} has no answer to number {number}. Get both files again.")
        options = _options(record, {letter: text for letter, text in record.need("options").items() if text})
        questions.append(
            _question(record, number, record.text("question"), options, str(solutions[str(number)]).strip())
        )
    return questions


def truthfulqa(path: Path, split: str) -> list[Question]:
    """TruthfulQA (Lin et al. 2022), Meditron's four categories: TruthfulQA.csv, as lines, or the hub's generation form.

    The best answer stands beside three wrong ones. Meditron draws and orders them without a seed; here both follow from
    the question, so that every run asks the same.
    """
    questions = []
    for number, record in enumerate(read_records(path)):
        if record.text("Category", "category") not in TRUTHFULQA_CATEGORIES:
            continue
        question, best = record.text("Question", "question"), record.text("Best Answer", "best_answer")
        wrong = record.need("Incorrect Answers", "incorrect_answers")
        wrong = [part.strip() for part in wrong.split(";")] if isinstance(wrong, str) else list(wrong)
        generator = random.Random(question)
        others = [text for text in wrong if text and text != best]
        texts = [best, *generator.sample(others, min(3, len(others)))]
        generator.shuffle(texts)
        answer = ascii_uppercase[texts.index(best)]
        subject = record.text("Category", "category")
        questions.append(_question(record, number, question, lettered(texts), answer, subject=subject))
    return questions


def medxpertqa(path: Path, split: str) -> list[Question]:
    """MedXpertQA, text (Zuo et al. 2025): ten options."""
    questions = []
    for number, record in enumerate(read_records(path)):
        options = _options(record, record.need("options"))
        subject = record.fields.get("body_system") or ""
        questions.append(
            _question(record, number, record.text("question"), options, record.text("label").strip(), subject=subject)
        )
    return questions


def bioasq(path: Path, split: str) -> list[Question]:
    """BioASQ's yes/no questions in BLURB's form: identifier, question, passages and answer in columns without names."""
    options = lettered(["yes", "no"])
    questions = []
    for number, record in enumerate(read_records(path, ["id", "question", "context", "label"])):
        label = record.text("label").strip().lower()
        letter = next((letter for letter, text in options.items() if text == label), label)
        asked, context = record.text("question").strip(), record.text("context").strip()
        questions.append(_question(record, number, asked, options, letter, context=context))
    return questions


READERS: dict[str, Reader] = {
    "bioasq": bioasq,
    "medqa": medqa,
    "medmcqa": medmcqa,
    "pubmedqa": pubmedqa,
    "mmlu_medical": mmlu_medical,
    "usmle": usmle,
    "truthfulqa": truthfulqa,
    "medxpertqa": medxpertqa,
}


def _question(
    record: Record, number: int, text: str, options: Mapping[str, str], answer: str, **others: str
) -> Question:
    named = record.fields.get("id") or record.fields.get("pubid") or record.key or record.fields.get("no") or number
    return checked(Question(str(named), text, dict(options), answer, **others), record.place)


def _options(record: Record, given: Any) -> dict[str, str]:
    """Options as letter -> text, a list of texts, or a list of key and value."""
    if isinstance(given, dict):
        return {str(letter): str(text) for letter, text in given.items() if text is not None}
    if isinstance(given, list) and all(
        isinstance(option, dict) and {"key", "value"} <= option.keys() for option in given
    ):
        return {str(option.get("key")): str(option.get("value")) for option in given}
    if isinstance(given, list):
        return lettered(given)
    raise DataError(f"{record.place}: the options are {str(given)[:40]!r}, not a list or letters with texts.")


def _letter(record: Record, number: int) -> str:
    if not 0 <= number < len(ascii_uppercase):
        raise DataError(
            f"{record.place}: the answer is option {number}, counted from 0: there is none. Correct that record."
        )
    return ascii_uppercase[number]


def texts_of(path: Path) -> Sequence[tuple[str, str]]:
    """Id and text of every document of a file with the field ``text``; documents without words are left out."""
    found: dict[str, str] = {}
    for number, record in enumerate(read_records(path)):
        text, name = record.text("text", "abstract"), str(record.fields.get("id") or number)
        if name in found:
            raise DataError(f"{record.place}: two documents have the id {name}. Make them different.")
        if text.split():
            found[name] = text
    if not found:
        raise DataError(f"{path} holds no document with words: the split is empty. Get the whole file.")
    return list(found.items())
