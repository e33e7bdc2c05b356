"""Scores against lm-eval's own backend and own tasks, on real questions, on one process and on TP x PP x DP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from megatron_med.checkpoint.huggingface.convert import export_huggingface, import_huggingface
from megatron_med.evaluate.catalogue import FOLDER, load_task, read_questions
from megatron_med.evaluate.language_model import MegatronMedLM
from megatron_med.evaluate.ways import Letter, Option
from tests.evaluation import scores_on_rank
from tests.ranks import run_ranks
from tests.small_models import write_small_llama

CLOSE = 1e-4
"""Log-likelihoods of options."""


@pytest.fixture(scope="module")
def checkpoint(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the tokenizer of Llama 2, as a checkpoint of ours."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = shared / "tokenizers" / "llama2_tokenizer.model"
    write_small_llama(folder / "hf", tokenizer, 5, vocab_size=32000, num_hidden_layers=4, initializer_range=0.15)
    import_huggingface(folder / "hf", folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> HFLM:
    """lm-eval's backend on the exported model."""
    export_huggingface(checkpoint, checkpoint.parent / "exported")
    return HFLM(pretrained=str(checkpoint.parent / "exported"), device="cpu", dtype="float32", batch_size=8)


def _pairs(shared: Path) -> list[tuple[str, str]]:
    """Real questions with their options: short and long ones, with and without a shared context."""
    pairs = []
    for name, file in (("medqa_4options", "medqa_us_4opt_a.jsonl"), ("pubmedqa", "pubmedqa_pqal_train500.json")):
        task = load_task(name)
        for question in read_questions(task, "test", shared / "qa" / file)[:12]:
            for way in (Letter(), Option()):
                prompt, ends = way.choices(task, question, [])
                pairs += [(prompt, end) for end in ends]
    return [*pairs, ("", "Fever is"), ("Fever ", "is high"), ("word " * 600, "and an end")]


def _texts(shared: Path) -> list[str]:
    """Abstracts, two of them longer than what the model reads at once, one empty but for a word."""
    with (shared / "pubmed" / "abstracts_ccby.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(8), file, strict=False)]
    return [*texts, " ".join(texts[:4]), "Aspirin", "\n".join(texts)]


def _instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]  # type: ignore[arg-type]


def _decided(scores: list[float]) -> tuple[int, float]:
    """The best of some options, and how far it leads."""
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    return order[0], scores[order[0]] - scores[order[1]]


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(1, 1, 1), (2, 2, 2)])
def test_log_likelihoods_are_those_of_lm_evals_backend(
    checkpoint: Path, theirs: HFLM, shared: Path, tensor: int, pipeline: int, data: int
) -> None:
    pairs, texts = _pairs(shared), _texts(shared)
    expected = theirs.loglikelihood(_instances("loglikelihood", pairs), disable_tqdm=True)
    rolled = theirs.loglikelihood_rolling(_instances("loglikelihood_rolling", [(t,) for t in texts]), disable_tqdm=True)
    results = run_ranks(tensor * pipeline * data, scores_on_rank, checkpoint, tensor, pipeline, pairs, texts)
    assert all(result == results[0] for result in results), "every rank has every score"
    ours, our_rolled = results[0]
    for pair, (mine, is_greedy), (other, theirs_greedy) in zip(pairs, ours, expected, strict=True):
        assert mine == pytest.approx(other, abs=CLOSE), pair
        assert is_greedy == theirs_greedy
    for mine, other in zip(our_rolled, rolled, strict=True):
        assert mine == pytest.approx(other, rel=1e-6)
    decided = 0
    for start in range(0, len(pairs) - 3, 4):  # any four neighbours are as good as the options of a question
        best, lead = _decided([score for score, _ in expected[start : start + 4]])
        if lead > 2 * CLOSE:
            decided += 1
            assert _decided([score for score, _ in ours[start : start + 4]])[0] == best
    print(f"{(len(pairs) - 3) // 4 - decided} of {(len(pairs) - 3) // 4} lie too near each other to be decided")
    assert decided > 20


def _hub_rows(shared: Path) -> dict[str, tuple[str, str, list[dict[str, Any]]]]:
    """lm-eval's task -> our task, split, and the local file in the columns that the task's own hub set has."""
    folder = shared / "qa"

    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n") if line]

    medqa = [
        {"id": str(number), "sent1": row["question"], "label": "ABCD".index(row["answer_idx"])}
        | {f"ending{place}": row["options"][letter] for place, letter in enumerate("ABCD")}
        for number, row in enumerate(lines("medqa_us_4opt_a.jsonl")[:40])
    ]
    keys = ("question", "opa", "opb", "opc", "opd")
    medmcqa = [{key: row[key] for key in keys} | {"cop": row["cop"] - 1} for row in lines("medmcqa_dev_a.jsonl")[:40]]
    pubmed = json.loads((folder / "pubmedqa_pqal_train500.json").read_text(encoding="utf-8"))
    pubmedqa = [
        {key: row[key] for key in ("QUESTION", "CONTEXTS", "final_decision")} for row in list(pubmed.values())[:40]
    ]
    mmlu = [row for row in lines("mmlu_medical.jsonl") if row["split"] == "test" and row["subject"] == "anatomy"][:40]
    anatomy = [{key: row[key] for key in ("question", "choices", "answer")} for row in mmlu]
    return {
        "medqa_4options": ("medqa_4options", "test", medqa),
        "medmcqa": ("medmcqa", "validation", medmcqa),
        "pubmedqa": ("pubmedqa", "test", pubmedqa),
        "mmlu_anatomy": ("mmlu_medical", "test", anatomy),
    }


def test_our_tasks_ask_and_score_as_lm_evals_own_do(
    checkpoint: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its YAML and functions over local files in the hub's columns, for which the hub is not asked."""
    rows = _hub_rows(shared)
    paths = {
        "GBaker/MedQA-USMLE-4-options-hf": "medqa_4options",
        "openlifescienceai/medmcqa": "medmcqa",
        "bigbio/pubmed_qa": "pubmedqa",
        "cais/mmlu": "mmlu_anatomy",
    }

    def from_hub(path: str, name: str | None = None, **_: Any) -> Any:
        _, split, content = rows[paths[path]]
        dataset = datasets.Dataset.from_list(content)
        return datasets.DatasetDict({split: dataset, "train": dataset, "dev": dataset, "validation": dataset})

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    model = MegatronMedLM(str(checkpoint))
    results = simple_evaluate(model, tasks=list(rows), log_samples=True, num_fewshot=0, verbosity="ERROR")
    assert results is not None
    files = {"medqa_4options": "medqa_us_4opt_a.jsonl", "medmcqa": "medmcqa_dev_a.jsonl"}
    files |= {"pubmedqa": "pubmedqa_pqal_train500.json", "mmlu_medical": "mmlu_medical.jsonl"}
    for name, (ours, _, _) in rows.items():
        task = load_task(ours)
        questions = read_questions(task, "test", shared / "qa" / files[ours])
        questions = [question for question in questions if name != "mmlu_anatomy" or question.subject == "anatomy"][:40]
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(questions) == 40
        way = Letter()
        for sample, question in zip(samples, questions, strict=True):
            prompt, ends = way.choices(task, question, [])
            asked = [tuple(arguments) for arguments in _arguments(sample)]
            assert asked == [(prompt, end) for end in ends]
            scores = [
                score.log_likelihood for score in model.scores([model.encode_pair(*pair) for pair in asked], True)
            ]
            assert scores == pytest.approx([float(each[0][0]) for each in sample["resps"]], abs=1e-5)
            assert (way.read(question, ends, scores, [1] * 4).letters["letter"] == question.answer) == sample["acc"]


def _arguments(sample: dict[str, Any]) -> list[list[str]]:
    arguments = sample["arguments"]
    if isinstance(arguments, dict):
        return [[one["arg_0"], one["arg_1"]] for one in arguments.values()]
    return [list(one) for one in arguments]


def test_our_yaml_runs_under_lm_eval_on_local_files(
    checkpoint: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> Callable[..., Any]:
        raise AssertionError("the hub is not asked")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    manager = TaskManager(include_path=str(FOLDER), metadata={"data": str(shared / "qa")}, verbosity="ERROR")
    names = ["local_medqa_4options", "local_medmcqa", "local_pubmedqa", "local_mmlu_medical", "local_truthfulqa"]
    model = MegatronMedLM(str(checkpoint))
    results = simple_evaluate(model, tasks=names, limit=10, task_manager=manager, verbosity="ERROR")
    assert results is not None
    for name in names:
        sample = results["samples"][name][0]
        task = load_task(name.removeprefix("local_"))
        question = read_questions(task, "test", _file(shared, task.name))[0]
        prompt, ends = Letter().choices(task, question, [])
        assert [tuple(one) for one in _arguments(sample)] == [(prompt, end) for end in ends]
        assert sample["acc"] in (0.0, 1.0)


def _file(shared: Path, task: str) -> Path:
    from megatron_med.evaluate.catalogue import find_file

    return find_file(load_task(task), "test", shared / "qa")


def test_text_that_lm_eval_asks_for_is_that_of_its_backend(checkpoint: Path, theirs: HFLM, shared: Path) -> None:
    questions = read_questions(load_task("medqa_4options"), "test", _file(shared, "medqa_4options"))[:6]
    options = {"until": ["\n\n", "e"], "max_gen_toks": 16, "do_sample": False}
    arguments = [(question.question[: 60 + 40 * number], options) for number, question in enumerate(questions)]
    instances = _instances("generate_until", arguments)
    ours = MegatronMedLM(str(checkpoint)).generate_until(instances, disable_tqdm=True)
    assert ours == theirs.generate_until(instances, disable_tqdm=True)


TEMPLATE = (
    "{% for m in messages %}{{ bos_token + m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant:' }}{% endif %}"
)


def test_chat_templates_are_those_of_lm_evals_backend(
    checkpoint: Path, theirs: HFLM, shared: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "chats"
    shutil.copytree(checkpoint.parent / "exported", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    models = [MegatronMedLM(str(folder)), HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)]
    history = [{"role": "user", "content": "Is it <s> a fever?"}, {"role": "assistant", "content": "It is."}]
    asked = [model.apply_chat_template(history[:1]) for model in models]
    assert asked[0] == asked[1] == "<s>user: Is it <s> a fever?</s><s>assistant:"
    assert models[0].tok_encode(asked[0]) == models[1].tok_encode(asked[0])
    assert models[0].tok_encode("fever") == models[1].tok_encode("fever")
    assert models[0].as_message("Is it <s> a fever?") == asked[0], "the templates of lm-eval and of our ways are one"
    resps = []
    for model in models:
        manager = TaskManager(include_path=str(FOLDER), metadata={"data": str(shared / "qa")}, verbosity="ERROR")
        options = {"limit": 4, "task_manager": manager, "apply_chat_template": True, "verbosity": "ERROR"}
        results = simple_evaluate(model, tasks=["local_medqa_4options"], **options)
        assert results is not None
        resps.append([float(one[0][0]) for row in results["samples"]["local_medqa_4options"] for one in row["resps"]])
    assert resps[0] == pytest.approx(resps[1], abs=CLOSE)
