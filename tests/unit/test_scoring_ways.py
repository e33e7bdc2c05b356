"""Ways of scoring: what a model is given, to the letter, how its answers are read, and what is made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import scipy.stats

from megatron_med.errors import DataError
from megatron_med.evaluate.catalogue import load_task
from megatron_med.evaluate.fewshot import apart_from, draw
from megatron_med.evaluate.parsing import Vote, after_answer_is, exact_text, first_word, majority, medalpaca_letter
from megatron_med.evaluate.questions import Question
from megatron_med.evaluate.results import accuracies, interval, key_of, perplexity
from megatron_med.evaluate.ways import (
    BioMedLlama,
    ChainOfThought,
    Letter,
    MedAlpaca,
    Option,
    SelfConsistency,
    TopToken,
    WrittenText,
)

ASKED = Question("1", "Which drug", {"A": "Aspirin", "B": "Beta blocker", "C": "None"}, "B")
SHOT = Question("2", "Which organ?", {"A": "Heart", "B": "Liver", "C": "Lung"}, "C")
STUDY = Question("3", "Does it help?", {"A": "yes", "B": "no", "C": "maybe"}, "C", context="It was tried.")
MEDQA, PUBMEDQA = load_task("medqa_4options"), load_task("pubmedqa")
LISTED = "A. Aspirin\nB. Beta blocker\nC. None\n"


def test_letters_and_options_are_asked_as_in_lm_eval() -> None:
    prompt, ends = Letter().choices(MEDQA, ASKED, [SHOT])
    shot = "Question: Which organ?\nA. Heart\nB. Liver\nC. Lung\nAnswer: C\n\n"
    assert prompt == f"{shot}Question: Which drug\n{LISTED}Answer:"
    assert ends == [" A", " B", " C"]
    prompt, ends = Option().choices(MEDQA, ASKED, [SHOT])
    assert prompt == f"{shot.replace('Answer: C', 'Answer: Lung')}Question: Which drug\n{LISTED}Answer:"
    assert ends == [" Aspirin", " Beta blocker", " None"]
    prompt, ends = Letter().choices(PUBMEDQA, STUDY, [])
    assert prompt == "Abstract: It was tried.\nQuestion: Does it help?\nAnswer:"
    assert ends == [" yes", " no", " maybe"]


def test_an_options_text_by_sum_by_character_and_by_token() -> None:
    reading = Option().read(ASKED, [" Aspirin", " Beta blocker", " None"], [-6.0, -8.0, -5.0], [1, 4, 1])
    assert reading.letters == {"option.sum": "C", "option.per_character": "B", "option.per_token": "B"}
    assert Letter().read(ASKED, [], [-3.0, -1.0, -2.0], [1, 1, 1]).letters == {"letter": "B"}


def test_biomed_llama_asks_without_the_options() -> None:
    assert BioMedLlama().choices(MEDQA, ASKED, [])[0] == "Question: Which drug\nAnswer:"
    prompt, ends = BioMedLlama().choices(PUBMEDQA, STUDY, [])
    assert prompt == "Abstract: It was tried.\nQuestion: Does it help?\nAnswer:"
    assert ends == ["Yes", "No", "Maybe"], "without a leading space"
    writing = WrittenText().writing(MEDQA, ASKED, [], 1)
    assert writing.prompt == "### Question: Which drug\n### Options: (A) Aspirin (B) Beta blocker (C) None\n### Answer:"
    assert WrittenText().writing(PUBMEDQA, STUDY, [], 1).prompt.startswith("### Context: It was tried.\n### Question:")


def test_meditron_is_asked_with_its_instructions() -> None:
    instruction = (
        "You are a medical doctor taking the US Medical Licensing Examination. You need to demonstrate your "
        "understanding of basic and clinical science, medical knowledge, and mechanisms underlying health, disease, "
        "patient care, and modes of therapy. Show your ability to apply the knowledge essential for medical practice. "
        "For the following "
        "multiple-choice question, select one correct answer from A to E. Base your answer on the current and standard "
        "practices referenced in medical guidelines."
    )
    question = "Question: Which drug?\n\nOptions:\nA. Aspirin\nB. Beta blocker\nC. None"
    writing = TopToken().writing(MEDQA, ASKED, [], 1)
    assert writing.prompt == f"{instruction}\n{question}\nThe answer is:\n"
    assert (writing.tokens, writing.stop, writing.is_message) == (1, ("###",), True)
    assert writing.sampling.frequency_penalty == 1.0
    shot = "Question: Which organ?\n\nOptions:\nA. Heart\nB. Liver\nC. Lung\nThe answer is: C"
    writing = TopToken().writing(MEDQA, ASKED, [SHOT], 1)
    assert writing.prompt == f"{instruction}\n{shot}\n\n{question}\nThe answer is:"
    assert writing.tokens == 9
    thought = ChainOfThought().writing(PUBMEDQA, STUDY, [], 1)
    assert thought.prompt == (
        "As an expert doctor in clinical science and medical knowledge, can you tell me if the following statement is "
        "correct? Answer yes, no, or maybe.\nIt was tried.\nDoes it help?\nLet's think step-by-step\n"
    )
    consistent = SelfConsistency(5).writing(MEDQA, ASKED, [], 1)
    assert (consistent.count, consistent.sampling.temperature) == (5, 0.8)


def test_medalpaca_is_asked_as_published() -> None:
    writing = MedAlpaca().writing(MEDQA, ASKED, [], 1)
    assert writing.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAnswer this multiple choice question."
        "\n\n### Input:\nWhich drug\nA: Aspirin\nB: Beta blocker\nC: None\n\n### Response:\n"
        "The Answer to the question is:"
    )
    assert (writing.sampling.temperature, writing.sampling.top_k, writing.sampling.top_p) == (0.4, 50, 0.9)
    assert writing.tokens == 128
    outputs = ["no idea", "perhaps B"]
    assert MedAlpaca().wants_more(MEDQA, ASKED, outputs)
    assert not MedAlpaca().wants_more(MEDQA, ASKED, [*outputs, " B: Beta blocker"])
    assert not MedAlpaca().wants_more(MEDQA, ASKED, ["no"] * 5), "five tries at most"


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), (" b.", "B"), ("B: Beta", "B"), ("(C) None", "C"), ("Because", None), ("D", None), ("", None),
     ("\n\nB", None), ("**A**", "A"), ("The answer is B", None), ("A\n\nQuestion: next", "A")],
)  # fmt: skip
def test_the_first_word_is_the_answer(text: str, letter: str | None) -> None:
    assert first_word(text, MEDQA, ASKED) == letter


@pytest.mark.parametrize(
    ("text", "letter"), [("yes", "A"), ("No.", "B"), ("maybe", "C"), ("yesyes", "A"), ("noyes", "B"), ("A", None)]
)
def test_maybe_is_an_answer(text: str, letter: str | None) -> None:
    assert first_word(text, PUBMEDQA, STUDY) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [("So.\nThe answer is: B", "B"), ("The answer is: A. No, the answer is: C ###", "C"), ("the answer\nis (B)", "B"),
     ("The answer is: Beta blocker", None), ("B", None), ("The answer is:", None)],
)  # fmt: skip
def test_a_chain_of_thought_ends_in_its_answer(text: str, letter: str | None) -> None:
    assert after_answer_is(text, MEDQA, ASKED) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [(" B: Beta blocker", "B"), ("B. Beta", "B"), ("B Beta", "B"), ("B", None), ("b: beta", None), ("D: none", None),
     ("'C: None'\n### Instruction: more", "C"), ("It is B: x", None)],
)  # fmt: skip
def test_medalpacas_answers_are_read_by_its_rule(text: str, letter: str | None) -> None:
    assert medalpaca_letter(text, ASKED) == letter


def test_an_exact_string_is_the_text_of_an_option_and_nothing_else() -> None:
    assert exact_text(" Beta blocker", ASKED) == "B"
    assert exact_text("(None)", ASKED) == "C"
    assert exact_text("beta blocker", ASKED) is None
    assert exact_text("Beta blocker, of course", ASKED) is None


def test_a_majority_leaves_out_what_was_not_read_and_tells_ties() -> None:
    assert majority(["B", None, "A", "B", None]) == Vote("B", False)
    assert majority(["A", "B", "B", "A"]) == Vote("A", True)
    assert majority([None, None]) == Vote(None, False)
    reading = SelfConsistency(3).read(MEDQA, ASKED, ["The answer is: B", "The answer is: C", "what"])
    assert reading.letters == {"self_consistency": "B"}
    assert reading.notes == {"answers": ["B", "C", None], "tie": True}


@pytest.mark.parametrize("seed", [1234, 432, 32])
def test_examples_are_those_that_meditron_draws(seed: int) -> None:
    training = [Question(str(n), f"Which {n}?", {"A": "a", "B": "b"}, "A") for n in range(200)]
    theirs = datasets.Dataset.from_list([{"id": str(n)} for n in range(200)]).shuffle(seed=seed).select(range(5))
    assert [shot.id for shot in draw(training, 5, seed)] == theirs["id"][:]


def test_examples_do_not_come_from_the_questions_that_are_asked() -> None:
    training = [Question(str(n), f"Which {n}?", {"A": "a", "B": "b"}, "A") for n in range(10)]
    assert apart_from(training, training[:2], Path("train.jsonl"), 3) == training[2:]
    with pytest.raises(DataError, match=r"train.jsonl: 10 of its 10 questions are asked, too: it is the test split"):
        apart_from(training, training, Path("train.jsonl"), 3)
    with pytest.raises(DataError, match="holds 8 questions to draw examples from, and --shots is 9"):
        apart_from(training, training[:2], Path("train.jsonl"), 9)


def test_intervals_are_scipys() -> None:
    values = np.random.default_rng(3).random(400) < 0.3
    low, high = interval(values)
    theirs = scipy.stats.bootstrap((values.astype(float),), np.mean, n_resamples=5000, method="percentile", rng=4)
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.008)


def _sample(question: str, letter: str | None, seed: int = 0, **others: object) -> dict[str, object]:
    named = {"seed": seed} if seed else {}
    return {"id": question, "score": "letter", **named, "predictions": {"letter": letter}, "gold": "A", **others}


def test_what_cannot_be_read_is_wrong_and_counted() -> None:
    samples = [
        _sample("1", "A"),
        _sample("2", "B"),
        _sample("3", None),
        _sample("4", None, too_long=True),
        _sample("5", "A"),
    ]
    wanted = {key_of(sample) for sample in samples[:4]}
    (found,) = accuracies(samples, wanted).values()
    assert found["value"] == 0.25
    assert (found["count"], found["unparsed"], found["too_long"]) == (4, 2, 1)
    assert json.loads(json.dumps(found)) == found


def test_seeds_have_a_mean_and_a_spread() -> None:
    samples = [_sample("1", "A", 7), _sample("2", "A", 7), _sample("1", "A", 8), _sample("2", "B", 8)]
    (found,) = accuracies(samples, set(map(key_of, samples))).values()
    assert found["value"] == 0.75
    assert found["seeds"] == {"7": 1.0, "8": 0.5}
    assert found["spread"] == pytest.approx(0.5 / math.sqrt(2))
    assert found["count"] == 2


def test_perplexity_is_over_words() -> None:
    samples = [
        {"id": str(n), "score": "perplexity", "loglikelihood": -10.0 * (n + 1), "words": 5 * (n + 1)} for n in range(4)
    ]
    (found,) = perplexity(samples, {(str(n), "perplexity", 0) for n in range(3)}).values()
    assert found["value"] == pytest.approx(math.exp(2.0))
    assert (found["count"], found["words"]) == (3, 30)
