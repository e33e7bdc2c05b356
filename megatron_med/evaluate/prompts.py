"""The published systems' prompts, to the letter. No torch here.

Meditron: epfLLM/meditron, evaluation/instructions.json and benchmarks.py. BioMed-LLaMA: Coldog2333/BioMed-LLaMA, its
lm-eval tasks and evaluation/mcqa_dataset.py. MedAlpaca: kbressem/medAlpaca, eval/eval_usmle.py and
medalpaca/prompt_templates/medalpaca.json.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_med.evaluate.catalogue import Task
from megatron_med.evaluate.questions import Question

_UNDERSTANDING = (
    "basic and clinical science, medical knowledge, and mechanisms underlying health, disease, patient care, and modes "
    "of therapy"
)
INSTRUCTIONS = {
    "medqa": (
        "You are a medical doctor taking the US Medical Licensing Examination. You need to demonstrate your "
        f"understanding of {_UNDERSTANDING}. Show your ability to apply the knowledge essential for medical practice. "
        "For the following multiple-choice question, select one correct answer from A to E. Base your answer on the "
        "current and standard practices referenced in medical guidelines."
    ),
    "medmcqa": (
        "You are a medical doctor answering realworld medical entrance exam questions. Based on your understanding of "
        f"{_UNDERSTANDING}, answer the following multiple-choice question. Select one correct answer from A to D. Base "
        "your answer on the current and standard practices referenced in medical guidelines."
    ),
    "pubmedqa": (
        "As an expert doctor in clinical science and medical knowledge, can you tell me if the following statement is "
        "correct? Answer yes, no, or maybe."
    ),
    "truthfulqa": (
        "Please truthfully answer the following multiple-choice question. Please ensure that your choice is socially "
        "unbiased and positive. If you don't know the answer to a question, please don't share false information."
    ),
    "mcq": "Answer the following multiple choice question.",
}
"""Meditron's system strings; ``mcq`` for sets that it was not scored on."""
ANSWER = "The answer is:"
STEP_BY_STEP = "Let's think step-by-step"
"""As the paper has it; the repository's files write "Let's think step by step."."""
STOP = "###"

MEDALPACA_INSTRUCTION = "Answer this multiple choice question."
MEDALPACA_PRIMER = "The Answer to the question is:"


def meditron(task: Task, question: Question, shots: Sequence[Question], last: str) -> str:
    """Instruction, shots, question, and what asks for the answer."""
    text = "".join(f"{_meditron_question(task, shot)}\n{ANSWER} {_meditron_gold(task, shot)}\n\n" for shot in shots)
    prompt = f"{INSTRUCTIONS[task.instructions]}\n{text}{_meditron_question(task, question)}\n{last}\n"
    return prompt[:-1] if shots else prompt


def _meditron_question(task: Task, question: Question) -> str:
    if task.answers == "texts":
        return f"{question.context}\n{question.question}"
    asked = question.question if question.question.endswith(("?", ".")) else question.question + "?"
    options = "\n".join(f"{letter}. {text}" for letter, text in question.options.items())
    return f"Question: {asked}\n\nOptions:\n{options}"


def _meditron_gold(task: Task, question: Question) -> str:
    return question.options[question.answer] if task.answers == "texts" else question.answer


def biomed_llama(question: Question) -> str:
    """Zero-shot: the question without its options, behind the abstract where there is one."""
    abstract = f"Abstract: {question.context}\n" if question.context else ""
    return f"{abstract}Question: {question.question}\nAnswer:"


def biomed_llama_text(question: Question) -> str:
    """What its models that write the option's text are asked."""
    context = f"### Context: {question.context}\n" if question.context else ""
    options = " ".join(f"({letter}) {text}" for letter, text in question.options.items())
    return f"{context}### Question: {question.question}\n### Options: {options}\n### Answer:"


def medalpaca(question: Question) -> str:
    """Instruction, input and response blocks, with the primer in the response."""
    options = "".join(f"\n{letter}: {text}" for letter, text in question.options.items())
    return (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request."
        f"\n\n### Instruction:\n{MEDALPACA_INSTRUCTION}\n\n### Input:\n{question.question}{options}\n\n### Response:\n"
        f"{MEDALPACA_PRIMER}"
    )
