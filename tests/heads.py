"""Question files and token files for heads that score."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

from megatron_med.evaluate.preprocess_questions import QuestionOptions, Written, preprocess_questions
from megatron_med.tokenizer.special import HEAD_TOKENS, extend_tokenizer

FINDINGS = ("fever", "cough", "rash", "nausea", "itch", "cramp", "fatigue", "pain")


def with_separator(tokenizer: Path, folder: Path) -> Path:
    """The tokenizer with BioMedLM's tokens for heads behind its 512 pieces."""
    extend_tokenizer(tokenizer, HEAD_TOKENS, folder)
    return folder


def write_questions(path: Path, count: int, seed: int) -> Path:
    """MedQA's form, four options, learnable: the right option repeats the finding that the question names last."""
    drawn = random.Random(seed)
    lines = []
    for number in range(count):
        options = drawn.sample(FINDINGS, 4)
        answer = drawn.randrange(4)
        others = " and ".join(drawn.sample(FINDINGS, drawn.randint(1, 3)))
        lines.append(
            json.dumps(
                {
                    "id": f"{path.stem}-{number}",
                    "question": f"After {others} the patient reports {options[answer]}.",
                    "options": dict(zip("ABCD", options, strict=True)),
                    "answer_idx": "ABCD"[answer],
                }
            )
        )
    path.write_text("\n".join(lines) + "\n")
    return path


def write_texts(path: Path, count: int, seed: int) -> Path:
    """PubMedQA's form, learnable: the context's last word decides."""
    drawn = random.Random(seed)
    records = {}
    for number in range(count):
        decision = drawn.choice(("yes", "no", "maybe"))
        ending = {"yes": "better", "no": "worse", "maybe": "alike"}[decision]
        records[f"{path.stem}{number}"] = {
            "QUESTION": f"Does it help against {drawn.choice(FINDINGS)}?",
            "CONTEXTS": [f"{drawn.choice(FINDINGS)} in {drawn.randint(2, 900)} patients.", f"They were {ending}"],
            "final_decision": decision,
        }
    path.write_text(json.dumps(records))
    return path


def preprocess_choice(questions: Path, tokenizer: Path, prefix: Path) -> Written:
    """Token files of four options a question."""
    options = QuestionOptions("medqa_4options", "train", questions, prefix, str(tokenizer), "multiple_choice")
    return preprocess_questions(_with_separator(options))


def preprocess_classes(texts: Path, tokenizer: Path, prefix: Path) -> Written:
    """Token files of yes, no, maybe."""
    options = QuestionOptions("pubmedqa", "train", texts, prefix, str(tokenizer), "classification")
    return preprocess_questions(_with_separator(options))


def _with_separator(options: QuestionOptions) -> QuestionOptions:
    return replace(options, separator="[SEP]", max_length=64)
