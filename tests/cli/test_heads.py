"""Heads through the tools: data, base, training, resuming, evaluation on a grid, export, and what is refused."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_med.checkpoint.folder import read_state, resolve_checkpoint
from megatron_med.checkpoint.load import check_model
from megatron_med.config import model_from_dict
from megatron_med.files import RUN_IDENTITY
from megatron_med.tokenizer.special import SUMMARY_TOKENS, extend_tokenizer
from tests.cli.processes import REPOSITORY, python, started_ranks, train, train_on_ranks, write_config
from tests.heads import FINDINGS, with_separator, write_questions, write_texts
from tests.small_models import write_small_llama

TIMEOUT = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_tokenizer: Path) -> Path:
    """A tokenizer with [SEP], a base that was imported with it, question files."""
    folder = tmp_path_factory.mktemp("heads")
    with_separator(sample_tokenizer, folder / "tokenizer")
    write_small_llama(folder / "hf", sample_tokenizer, 1, initializer_range=0.05)
    arguments = ("import", "--from", folder / "hf", "--to", folder / "base", "--tokenizer", folder / "tokenizer")
    done = python("tools/convert_checkpoint.py", *arguments)
    assert done.returncode == 0, done.stderr
    write_questions(folder / "train.jsonl", 400, 1)
    write_questions(folder / "test.jsonl", 100, 2)
    write_texts(folder / "train.json", 300, 1)
    write_texts(folder / "test.json", 90, 2)
    return folder


def _preprocess(folder: Path, task: str, head: str, source: str, prefix: str, *options: object) -> str:
    arguments = ("--task", task, "--head", head, "--input", folder / source, "--tokenizer", folder / "tokenizer")
    size = ("--max-length", 64, "--output-prefix", folder / prefix)
    done = python("tools/preprocess_questions.py", *arguments, *size, *options)
    return done.stdout if done.returncode == 0 else done.stderr


def _config(folder: Path, out: Path, prefix: str, steps: int, **model: Any) -> Path:
    out.mkdir(exist_ok=True)
    stored = json.loads(next((folder / "base").glob("step-*/state.json")).read_text())["model"]
    shape = {name: value for name, value in stored.items() if name not in ("preset", "head", "num_labels")}
    return write_config(
        out,
        folder / prefix,
        model=shape | model,
        data={"sequence_length": 256, "valid": [{"path": str(folder / prefix)}]},
        train={"steps": steps, "global_batch_size": 8, "micro_batch_size": 2, "valid_interval": 20, "valid_samples": 8},
        optimizer={"lr": 2e-3},
        lr_schedule={"warmup_fraction": 0.5, "min_lr": 0.0},
        checkpoint={"load": str(folder / "base"), "interval": 20},
    )


def _evaluated(folder: Path, run: Path, task: str, source: str, output: Path) -> dict[str, Any]:
    options = ("--checkpoint", run, "--tasks", f"{task}={folder / source}", "--score", "head", "--output", output)
    done = python("tools/evaluate.py", *options)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "results.json").read_text())


def test_a_choice_is_tuned_goes_on_and_is_scored_on_any_grid(folder: Path, tmp_path: Path) -> None:
    told = _preprocess(folder, "medqa_4options", "multiple_choice", "train.jsonl", "choice")
    assert "400 questions, 1,600 sequences" in told
    config = _config(folder, tmp_path / "a", "choice", 80, head="multiple_choice")
    first = train(config, "--train.steps", "40")
    assert "the head (multiple_choice) is new: its weights are the initial ones" in first.stdout
    train_on_ranks(4, config, "--parallel.tensor", 2, "--parallel.pipeline", 2)
    run = tmp_path / "a" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 81))
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    content = _evaluated(folder, run, "medqa_4options", "test.jsonl", tmp_path / "scores")
    found = content["tasks"]["medqa_4options"]["head"]
    assert found["count"] == 100
    assert found["value"] > 0.45, "the head has learnt nothing"
    assert "calibration" in content["analysis"]["medqa_4options"]["head"]
    assert "cut" not in found
    short = ("--checkpoint", run, "--tasks", f"medqa_4options={folder / 'test.jsonl'}", "--score", "head", "--limit", 9)
    done = python("tools/evaluate.py", *short, "--max-length", 8, "--output", tmp_path / "short")
    assert "of 9, cut 9" in done.stdout.replace(";", ","), done.stderr
    grid = ("--tensor", 2, "--pipeline", 2, "--checkpoint", run, "--score", "head", "--output", tmp_path / "grid")
    task = f"medqa_4options={folder / 'test.jsonl'}"
    with started_ranks(range(8), 8, "tools/evaluate.py", "--tasks", task, *grid) as processes:
        for process in processes:
            assert process.wait(TIMEOUT) == 0, process.output()[-3000:]
    samples = [
        [json.loads(line) for line in (tmp_path / name / "samples_medqa_4options.jsonl").read_text().splitlines()]
        for name in ("scores", "grid")
    ]
    for alone, there in zip(*samples, strict=True):
        assert there["loglikelihoods"] == pytest.approx(alone["loglikelihoods"], abs=1e-4)
        assert there["prompt"].endswith("[SEP]")
    exported = python("tools/convert_checkpoint.py", "export", "--from", run, "--to", tmp_path / "hf")
    assert exported.returncode == 2
    assert "no class of transformers holds it" in exported.stderr
    written = python("tools/generate.py", "--checkpoint", run, "--prompt", "After")
    assert written.returncode == 2
    assert "scores texts and writes none" in written.stderr


def test_a_classification_is_tuned_scored_and_read_by_transformers(folder: Path, tmp_path: Path) -> None:
    told = _preprocess(folder, "pubmedqa", "classification", "train.json", "classes")
    assert "labels yes, no, maybe" in told
    config = _config(folder, tmp_path / "a", "classes", 60, head="classification", num_labels=3)
    assert train(config).returncode == 0
    run = tmp_path / "a" / "run"
    content = _evaluated(folder, run, "pubmedqa", "test.json", tmp_path / "scores")
    assert content["tasks"]["pubmedqa"]["head"]["value"] > 0.5, "the head has learnt nothing"
    target = tmp_path / "hf"
    exported = python("tools/convert_checkpoint.py", "export", "--from", run, "--to", target, "--verify")
    assert exported.returncode == 0, exported.stderr
    import transformers

    pipe = transformers.pipeline("text-classification", model=str(target), top_k=None)
    lines = (tmp_path / "scores" / "samples_pubmedqa.jsonl").read_text().splitlines()
    for sample in map(json.loads, lines[:10]):
        best = max(pipe([sample["prompt"]])[0], key=lambda one: one["score"])
        assert best["label"] == {"A": "yes", "B": "no", "C": "maybe"}[sample["prediction"]]
    other = tmp_path / "bioasq.tsv"
    other.write_text("1\tIs it?\tIt is.\tyes\n")
    fits = ("--checkpoint", run, "--tasks", f"bioasq={other}", "--score", "head", "--output", tmp_path / "fits")
    assert python("tools/evaluate.py", *fits).returncode == 0  # yes and no are among its labels
    asked = ("--checkpoint", run, "--tasks", f"medqa_4options={folder / 'test.jsonl'}", "--score", "head")
    unknown = python("tools/evaluate.py", *asked, "--output", tmp_path / "unknown")
    assert unknown.returncode == 2
    assert "and the head has yes, no, maybe" in unknown.stderr
    likelihood = ("--checkpoint", run, "--tasks", f"pubmedqa={folder / 'test.json'}", "--output", tmp_path / "other")
    refused = python("tools/evaluate.py", *likelihood)
    assert refused.returncode == 2
    assert "scores texts and writes none" in refused.stderr


def test_what_does_not_fit_a_head_is_a_message(folder: Path, tmp_path: Path) -> None:
    _preprocess(folder, "medqa_4options", "multiple_choice", "train.jsonl", "small", "--overwrite")
    missing = _preprocess(folder, "pubmedqa", "classification", "train.json", "two", "--labels", "yes", "no")
    assert "has the label 'maybe', and the head has yes, no" in missing
    no_separator = _preprocess(folder, "pubmedqa", "classification", "train.json", "two", "--separator", "<sep>")
    assert "is no special token" in no_separator
    assert "exists" in _preprocess(folder, "medqa_4options", "multiple_choice", "train.jsonl", "small")
    labels = _preprocess(folder, "medqa_4options", "multiple_choice", "train.jsonl", "x", "--labels", "a", "b")
    assert "Leave it out" in labels

    def refused(*changes: object, **model: Any) -> str:
        done = train(_config(folder, tmp_path, "small", 2, **model), *changes)
        assert done.returncode == 2
        return done.stderr

    assert "set model.head: multiple_choice." in refused()
    assert "set model.head: multiple_choice." in refused(head="classification", num_labels=4)
    assert "a classification has 2 to 254" in refused(head="classification")
    assert "scores options one by one" in refused(head="multiple_choice", num_labels=3)
    assert "a head is trained with all weights" in refused("--lora.rank", 2, head="multiple_choice")
    assert "so no moments of it" in refused("--checkpoint.load_state", "all", head="multiple_choice")
    short = refused("--data.sequence_length", 16, head="multiple_choice")
    assert "do not fit into data.sequence_length = 16" in short
    positions = refused("--model.max_position_embeddings", 32, head="multiple_choice")
    assert "sequences of up to 64 tokens" in positions
    scored = ("--checkpoint", folder / "base", "--tasks", f"medqa_4options={folder / 'test.jsonl'}")
    done = python("tools/evaluate.py", *scored, "--score", "head", "--output", tmp_path / "none")
    assert done.returncode == 2
    assert "leave --score head out" in done.stderr


def test_runs_and_checkpoints_from_before_there_were_heads_fit(sample_data: Path, tmp_path: Path) -> None:
    """A run's identity is what it was, and a state that names no head is a language model's."""
    shape = {"preset": "gpt2-tiny", "vocab_size": 512}
    config = write_config(
        tmp_path, sample_data, model=shape, data={"sequence_length": 32}, train={"steps": 1}, checkpoint={"interval": 1}
    )
    assert train(config).returncode == 0
    identity = (tmp_path / "run" / RUN_IDENTITY).read_text()
    assert "vocab_size" in identity
    assert "head" not in identity.replace("attention_heads", "").replace("head_dim", "")
    state = read_state(resolve_checkpoint(tmp_path / "run"))
    for name in ("head", "num_labels"):
        state.model.pop(name)
    check_model(state, model_from_dict(state.model), tmp_path)


RECIPES = REPOSITORY / "examples" / "biomedlm" / "finetune"
HEADS = {"medqa": "train.jsonl", "pubmedqa": "train.json", "bioasq": "train.tsv"}


def _toy(folder: Path, recipe: str, base: Path, out: Path) -> Path:
    """A recipe with a small model, short sequences and few steps; everything else as it is published."""
    tree = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    stored = json.loads(next(base.glob("step-*/state.json")).read_text())["model"]
    kept = {name: tree["model"][name] for name in ("head", "num_labels") if name in tree["model"]}
    tree["model"] = {
        name: value for name, value in stored.items() if name not in ("preset", "head", "num_labels")
    } | kept
    tree["data"] |= {"sequence_length": 256, "cache_dir": str(out / "cache")}
    for part in ("train", "valid"):
        tree["data"][part] = [{"path": str(out / "data")}]
    del tree["train"]["epochs"]
    tree["train"] |= {"steps": 4, "global_batch_size": 4, "output_dir": str(out / "run"), "valid_interval": 2}
    tree["train"]["valid_samples"] = 4
    tree["precision"] = "fp32"
    tree["parallel"] = {}
    tree["checkpoint"] |= {"load": str(base), "interval": 2}
    (out / "config.yaml").write_text(yaml.safe_dump(tree))
    return out / "config.yaml"


def _prepare(environment: dict[str, str], *arguments: object) -> None:
    command = ["bash", str(RECIPES / "prepare.sh"), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("recipe", HEADS)
def test_a_recipe_of_a_head_runs(folder: Path, tmp_path: Path, recipe: str, forked_environment: dict[str, str]) -> None:
    rows = [f"{n}\tIs it {n}?\t{n} is a {'fever' if n % 2 else 'rash'}.\t{'yes' if n % 2 else 'no'}" for n in range(40)]
    (folder / "train.tsv").write_text("\n".join(rows) + "\n")
    raw = folder / HEADS[recipe]
    _prepare(forked_environment, recipe, raw, tmp_path / "data", folder / "tokenizer", "--max-length", 64)
    done = train(_toy(folder, recipe, folder / "base", tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "best").is_file()


def test_summaries_are_tuned_and_scored_by_beams_and_rouge(
    folder: Path, tmp_path: Path, sample_tokenizer: Path, forked_environment: dict[str, str]
) -> None:
    tokenizer, base, table = tmp_path / "tokenizer", tmp_path / "base", tmp_path / "meqsum.csv"
    extend_tokenizer(sample_tokenizer, SUMMARY_TOKENS, tokenizer)
    arguments = ("import", "--from", folder / "hf", "--to", base, "--tokenizer", tokenizer)
    assert python("tools/convert_checkpoint.py", *arguments).returncode == 0
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["File", "CHQ", "Summary"])
        for number in range(24):
            what = FINDINGS[number % len(FINDINGS)]
            writer.writerow(
                [number, f"SUBJECT: {what}\nMESSAGE: I have {what}, what helps?", f"How is {what} treated?"]
            )
        writer.writerow([24, "fever " * 400, "How is fever treated?"])
    _prepare(forked_environment, "meqsum", table, tmp_path / "data", tokenizer)
    config = _toy(folder, "meqsum", base, tmp_path)
    tuned = train(config)
    assert tuned.returncode == 0, tuned.stderr
    assert "left out, too long: 1 conversation" in tuned.stdout
    run, out = tmp_path / "run", tmp_path / "scores"
    arguments = ("--checkpoint", run, "--tasks", f"meqsum={table}", "--output", out)
    assert python("tools/evaluate.py", *arguments, "--limit", 4).returncode == 0
    done = python("tools/evaluate.py", *arguments)
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for line in (out / "samples_meqsum.jsonl").read_text().splitlines()]
    assert [sample["id"] for sample in samples] == [str(number) for number in range(25)]
    assert samples[24]["too_long"]
    assert samples[24]["outputs"] == []
    assert samples[0]["prompt"].endswith("what helps?<|startoftext|>")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    totals = dict.fromkeys(("rouge1", "rouge2", "rougeL"), 0.0)
    for sample in samples[:24]:
        for name, found in scorer.score(sample["reference"], sample["outputs"][0]).items():
            assert sample["rouge"][name] == pytest.approx(found.fmeasure)
            totals[name] += found.fmeasure / 25
    content = json.loads((out / "results.json").read_text())["tasks"]["meqsum"]
    assert {name: content[name]["value"] for name in totals} == pytest.approx(totals)
    assert (content["rouge1"]["count"], content["rouge1"]["too_long"]) == (25, 1)
    assert "meqsum" in (out / "report.html").read_text()
