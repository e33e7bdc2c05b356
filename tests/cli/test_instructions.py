"""Instruction data from real files to a tuned, exported model; records that cannot be used; kills and resumes."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_med.data.indexed import IndexedDataset
from megatron_med.data.sources import roles_prefix
from megatron_med.tokenizer import load_tokenizer
from megatron_med.tokenizer.special import CHAT_TOKENS, extend_tokenizer
from tests.cli.processes import (
    REPOSITORY,
    TRAIN,
    python,
    read_metrics,
    started_forked,
    train,
    wait_for_step,
    write_config,
)
from tests.conftest import SAMPLE

TOOL = "tools/preprocess_instructions.py"
PAIR = {"question": "Is it?", "answer": "It is."}


@pytest.fixture(scope="module")
def tokenizer(sample_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "tokenizer"
    extend_tokenizer(sample_tokenizer, CHAT_TOKENS, folder)
    return folder


def _make(tokenizer: Path, prefix: Path, inputs: list[Path], *options: object, template: str = "chatml") -> Any:
    common = ("--tokenizer", tokenizer, "--template", template, "--output-prefix", prefix)
    return python(TOOL, "--input", *inputs, *common, *options)


def _texts(prefix: Path, tokenizer: Path) -> list[str]:
    data, loaded = IndexedDataset(prefix), load_tokenizer(tokenizer)
    return [loaded.decode(data.read(number).tolist()) for number in range(len(data))]


def _chatml(question: str, answer: str) -> str:
    return f"<|im_start|>question\n{question}<|im_end|>\n<|im_start|>answer\n{answer}<|im_end|>\n"


REAL = {
    "instruct/medical_meadow_wikidoc_patient.json": 2000,
    "instruct/gsm8k_alpaca.json": 600,
    "instruct/medquad_qa.jsonl": 1200,
    "instruct/oasst_en_trees.jsonl": 431,
    "qa/medmcqa_dev_a.jsonl": 2948,
    "qa/medqa_us_4opt_a.jsonl": 623,
    "qa/pubmedqa_pqal_train500.json": 500,
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(shared: Path, tokenizer: Path, tmp_path: Path, name: str) -> None:
    done = _make(tokenizer, tmp_path / "out", [shared / name], "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert f"{REAL[name]:,} conversations" in done.stdout
    data, roles = IndexedDataset(tmp_path / "out"), IndexedDataset(roles_prefix(tmp_path / "out"))
    assert len(data) == len(roles) == REAL[name]
    np.testing.assert_array_equal(data.sizes, roles.sizes)
    assert roles.dtype == np.uint8
    side = json.loads((tmp_path / "out.json").read_text())
    assert side["trained"] == sum(int((roles.read(number) == 1).sum()) for number in range(len(roles)))
    assert side["chat"]["turn_end_id"] == 513
    shown = python("tools/inspect_data.py", tmp_path / "out", "--conversation", 1).stdout
    assert "[[«<|im_start|>»answer\n" in shown
    assert "«<|im_end|>»\n]]" in shown


def test_questions_with_options_as_published(shared: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Meditron's wording, letters told from the whole file, and explanations."""
    before, behind = "You are a medical doctor.", "The answer is:"
    options = ("--before", before, "--behind", behind)
    record = json.loads((shared / "qa" / "medmcqa_dev_a.jsonl").read_text().split("\n")[0])
    assert record["cop"] == 1
    listed = "\n".join(
        f"{letter}. {record[key]}" for letter, key in zip("ABCD", ("opa", "opb", "opc", "opd"), strict=True)
    )
    asked = f"{before}\nQuestion: {record['question']}?\n\nOptions:\n{listed}\n{behind}"
    assert _make(tokenizer, tmp_path / "letter", [shared / "qa" / "medmcqa_dev_a.jsonl"], *options).returncode == 0
    assert _texts(tmp_path / "letter", tokenizer)[0] == _chatml(asked, "A")
    done = _make(
        tokenizer,
        tmp_path / "cot",
        [shared / "qa" / "medmcqa_dev_a.jsonl"],
        "--answers",
        "explained",
        "--skip-bad-records",
    )
    assert done.returncode == 0, done.stderr
    assert "records, no explanation to answer with" in done.stdout
    for text in _texts(tmp_path / "cot", tokenizer)[:20]:
        assert text.removesuffix(" ###<|im_end|>\n").rpartition("\n")[2].startswith("The answer is: ")
    done = _make(tokenizer, tmp_path / "option", [shared / "qa" / "medqa_us_4opt_a.jsonl"], "--answers", "option")
    first = json.loads((shared / "qa" / "medqa_us_4opt_a.jsonl").read_text().split("\n")[0])
    assert _texts(tmp_path / "option", tokenizer)[0].endswith(f"answer\n{first['answer']}<|im_end|>\n")


def test_how_options_are_counted_is_told_by_all_records(tokenizer: Path, tmp_path: Path) -> None:
    base = {"question": "Which?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "exp": None}
    for numbers, outcome in (
        ([1, 2, 4], ["A", "B", "D"]),
        ([0, 2, 3], ["A", "C", "D"]),
        ([1, 2, 3], "neither 0 nor 4"),
        ([0, 4], "0 and 4 both"),
        ([4, 1, -1], "'cop' is -1: no option has that number"),
    ):
        path, prefix = tmp_path / "m.jsonl", tmp_path / "m"
        path.write_text("".join(json.dumps(base | {"cop": number}) + "\n" for number in numbers))
        done = _make(tokenizer, prefix, [path], "--overwrite")
        if isinstance(outcome, str):
            assert done.returncode == 2
            assert outcome in done.stderr
        else:
            answers = [
                text.rpartition("answer\n")[2].removesuffix("<|im_end|>\n") for text in _texts(prefix, tokenizer)
            ]
            assert answers == outcome
    path.write_text("".join(json.dumps(base | {"cop": number}) + "\n" for number in (1, 2, 3)))
    assert _make(tokenizer, prefix, [path], "--overwrite", "--first-option", 1).returncode == 0


def test_every_kind_of_file_gives_the_same(tokenizer: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [{"question": f'Is "{n}", it\nso?', "answer": f"Yes, {n} β."} for n in range(50)]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.json").write_bytes(lines)
    (tmp_path / "c.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "d.json").write_text(json.dumps({str(n): record for n, record in enumerate(records)}))
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "f.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "g.json.gz").write_bytes(gzip.compress(json.dumps(records).encode()))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "h.parquet")
    for name, delimiter in (("i.csv", ","), ("j.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(records)
    files = sorted(path for path in tmp_path.iterdir())
    assert len(files) == 10
    whole = {}
    for path in files:
        done = _make(tokenizer, tmp_path / "out" / path.name[0], [path])
        assert done.returncode == 0, done.stderr
        whole[path.name] = (tmp_path / "out" / f"{path.name[0]}.bin").read_bytes()
    assert len(set(whole.values())) == 1
    for shard in range(3):
        done = _make(tokenizer, tmp_path / f"s{shard}", [tmp_path / "c.json"], "--shard", f"{shard}/3")
        assert done.returncode == 0, done.stderr
    assert b"".join((tmp_path / f"s{shard}.bin").read_bytes() for shard in range(3)) == whole["c.json"]
    columns = ("--columns", "question=question", "answer=answer")
    assert _make(tokenizer, tmp_path / "t", [tmp_path / "i.csv"], *columns).returncode == 0
    assert (tmp_path / "t.bin").read_bytes() == whole["i.csv"]


def _messages(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (_messages(("user", "Q")), "it ends without an answer"),
        (_messages(("user", "Q"), ("assistant", "A"), ("assistant", "B")), "message 3 is the second answer in a row"),
        (_messages(("assistant", "A")), "message 1 is an answer to nothing"),
        (_messages(("user", "Q"), ("doctor", "A")), "unknown role 'doctor'"),
        (_messages(("user", "Q"), ("system", "S"), ("assistant", "A")), "message 2 is a system message"),
        (_messages(("user", "Q"), ("assistant", " ")), "message 2 (assistant) is empty"),
        ({"messages": "none"}, "'messages' is no list of messages"),
        ({"messages": [{"role": "user"}]}, "no field 'content'"),
        ({"instruction": "Do", "output": 7}, "'output' is int, not text"),
        ({"question": "Q", "options": {"A": "a"}, "answer_idx": "B"}, "names one of the options"),
        ({"QUESTION": "Q", "CONTEXTS": "C", "final_decision": "yes"}, "'CONTEXTS' is no list of texts"),
        ({"prompt": {"text": "Q", "role": "prompter", "replies": []}}, "no answer in it"),
        ({"tokens": [1]}, "fields tokens: of no known form"),
        ([1], "list, not an object with fields"),
        ("{", "broken JSON"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(tokenizer: Path, tmp_path: Path, record: Any, message: str) -> None:
    path = tmp_path / "a.jsonl"
    line = record if isinstance(record, str) else json.dumps(record)
    path.write_text(f"{json.dumps(PAIR)}\n{line}\n{json.dumps(PAIR)}\n")
    done = _make(tokenizer, tmp_path / "out", [path])
    assert done.returncode == 2
    assert f"{path}:2: " in done.stderr
    assert message in done.stderr
    assert "pass --skip-bad-records" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("out*"))
    done = _make(tokenizer, tmp_path / "out", [path], "--skip-bad-records")
    assert done.returncode == 0
    assert "2 conversations" in done.stdout
    assert "left out: 1 record, " in done.stdout


def test_commands_that_cannot_be_meant(tokenizer: Path, sample_tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PAIR) + "\n")
    for options, message in (
        (("--columns", "question=q"), "question=NAME and answer=NAME are needed"),
        (("--format", "alpaca"), "no field 'instruction'"),
        (("--workers", 0), "--workers is 0"),
    ):
        done = _make(tokenizer, tmp_path / "out", [path], *options)
        assert done.returncode == 2
        assert message in done.stderr
    done = _make(sample_tokenizer, tmp_path / "out", [path])
    assert "needs the special token <|im_end|>, <|im_start|>" in done.stderr
    (tmp_path / "empty.jsonl").write_text("")
    assert "no conversation in it" in _make(tokenizer, tmp_path / "out", [tmp_path / "empty.jsonl"]).stderr
    (tmp_path / "bad.json").write_text('[{"question": ')
    assert "bad.json:1 is broken JSON" in _make(tokenizer, tmp_path / "out", [tmp_path / "bad.json"]).stderr
    (tmp_path / "bad.csv").write_text("question,answer\na,b,c\n")
    assert "record 1 has another number of cells" in _make(tokenizer, tmp_path / "out", [tmp_path / "bad.csv"]).stderr
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    assert "is no Parquet file" in _make(tokenizer, tmp_path / "out", [tmp_path / "bad.parquet"]).stderr
    assert not list(tmp_path.glob("out*"))


_SLOW = """
import sys
from megatron_med.data import pipeline
pipeline._SECONDS_BETWEEN_POSITIONS = 0.2
pipeline._BYTES_PER_TASK = 1 << 14
sys.argv = ["tools/preprocess_instructions.py", *sys.argv[1:]]
import runpy
runpy.run_path("tools/preprocess_instructions.py", run_name="__main__")
"""


def test_killed_it_goes_on_to_the_same_bytes(shared: Path, tokenizer: Path, tmp_path: Path) -> None:
    path = shared / "instruct" / "medical_meadow_wikidoc_patient.json"
    inputs = [tmp_path / f"{number}.json" for number in range(4)]
    for copy in inputs:
        shutil.copy(path, copy)
    assert _make(tokenizer, tmp_path / "whole", inputs).returncode == 0
    options = ["--tokenizer", tokenizer, "--template", "chatml", "--output-prefix", tmp_path / "out"]
    command = [sys.executable, "-c", _SLOW, "--input", *inputs, *options]
    process = subprocess.Popen(list(map(str, command)), cwd=REPOSITORY, start_new_session=True)
    journals = [tmp_path / "out.partial.json", tmp_path / "out.roles.partial.json"]
    deadline = time.monotonic() + 100
    try:
        while not all(journal.exists() for journal in journals):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, 9)
        process.wait()
    done = _make(tokenizer, tmp_path / "out", inputs)
    assert done.returncode == 0, done.stderr
    assert "went on after " in done.stdout
    for suffix in (".bin", ".idx", ".roles.bin", ".roles.idx"):
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("out", "whole"))
    assert {k: first[k] for k in ("trained", "answers", "documents")} == {
        k: second[k] for k in ("trained", "answers", "documents")
    }


@pytest.fixture(scope="module")
def data(shared: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train`` and ``valid`` of real questions and answers."""
    folder = tmp_path_factory.mktemp("data")
    lines = (shared / "instruct" / "medquad_qa.jsonl").read_text().split("\n")[:330]
    short = [line for line in lines if line and len(line) < 1500]
    for name, part in (("train", short[:160]), ("valid", short[160:200])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n")
        assert _make(tokenizer, folder / name, [folder / f"{name}.jsonl"]).returncode == 0
    return folder


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Path:
    return write_config(
        tmp_path,
        data / "train",
        model={"preset": "llama-tiny", "vocab_size": 514, "num_layers": 2, "max_position_embeddings": 640},
        data={"sequence_length": 640, "valid": [{"path": str(data / "valid")}], "truncate": "right"},
        train={"epochs": 2, "steps": 0, "global_batch_size": 8, "valid_interval": 5, "valid_samples": 4},
        optimizer={"lr": 3e-3},
        lr_schedule={"warmup_fraction": 0.1},
        checkpoint={"interval": 100, "keep": 1, "keep_best": "valid_loss"},
    )


def test_epochs_a_resume_in_the_middle_and_the_export(config: Path, data: Path, tmp_path: Path) -> None:
    whole = train(config)
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "run"
    lines = read_metrics(run)
    losses = [line["loss"] for line in lines]
    assert losses[-1] < losses[0] - 1
    best = min((line["valid_loss"], line["step"]) for line in lines if "valid_loss" in line)
    assert (run / "checkpoints" / "best").read_text() == f"step-{best[1]:08d}\n"
    assert (run / "checkpoints" / f"step-{best[1]:08d}").is_dir()

    other = tmp_path / "other"
    arguments = ("--train.output_dir", other, "--checkpoint.interval", 3, "--checkpoint.keep", 0)
    with started_forked([*TRAIN, str(config), *map(str, arguments)]) as process:
        wait_for_step(other, 8, process, process.output)
        process.kill()
    assert train(config, *arguments).returncode == 0
    again = read_metrics(other)
    assert [line["loss"] for line in again] == losses
    assert [line.get("valid_loss") for line in again] == [line.get("valid_loss") for line in lines]

    done = python("tools/convert_checkpoint.py", "export", "--from", run, "--to", tmp_path / "hf", "--verify")
    assert done.returncode == 0, done.stderr
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.generation_config.eos_token_id == 513 == theirs.convert_tokens_to_ids("<|im_end|>")
    records = [json.loads(line) for line in (data / "valid.jsonl").read_text().split("\n") if line]
    ids, roles = IndexedDataset(data / "valid"), IndexedDataset(roles_prefix(data / "valid"))
    for number, record in enumerate(records[:10]):
        messages = [
            {"role": "user", "content": record["instruction"]},
            {"role": "assistant", "content": record["output"]},
        ]
        found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert list(found["input_ids"]) == ids.read(number).tolist()
        assert list(found["assistant_masks"]) == roles.read(number).tolist()
    prompt = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] > prompt["input_ids"].shape[1]

    changed = train(config, "--data.loss", "all")
    assert changed.returncode == 2
    assert "data.conversations.loss is 'all', but" in changed.stderr


def test_data_that_does_not_go_together(
    config: Path, data: Path, sample_data: Path, tokenizer: Path, tmp_path: Path
) -> None:
    arguments = ("--input", SAMPLE, "--tokenizer", tokenizer, "--output-prefix", tmp_path / "text")
    assert python("tools/preprocess_data.py", *arguments).returncode == 0
    both = f"[{{path: {data}/train}}, {{path: {tmp_path}/text}}]"
    for options, message in (
        (("--data.train", both), "holds text, the other corpora hold conversations"),
        (("--train.steps", 5), "train.steps is 5 and train.epochs 2.0: give one of them"),
        (
            ("--data.truncate", "error", "--data.sequence_length", 64),
            "conversations do not fit into data.sequence_length",
        ),
        (("--data.train", f"[{{path: {data}/train, weight: 2, repeat: 2}}]"), "both weight and repeat"),
        (("--lr_schedule.warmup_steps", 3), "give one of them"),
        (("--train.valid_interval", 0), "keep_best is valid_loss: it needs train.valid_interval"),
    ):
        done = train(config, *options)
        assert done.returncode == 2, message
        assert message in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
    (tmp_path / "t").mkdir()
    text = write_config(
        tmp_path / "t",
        sample_data,
        model={"preset": "llama-tiny", "vocab_size": 512, "num_layers": 1},
        data={"sequence_length": 64},
        train={"steps": 2, "global_batch_size": 2},
    )
    assert "repeat, and holds text" in train(text, "--data.train", f"[{{path: {sample_data}, repeat: 2}}]").stderr
    done = train(text, "--train.steps", 0, "--train.epochs", 0.01)
    assert done.returncode == 0, done.stderr
    two = f"[{{path: {sample_data}}}, {{path: {sample_data}}}]"
    done = train(
        text, "--train.steps", 0, "--train.epochs", 1, "--data.train", two, "--train.output_dir", tmp_path / "r2"
    )
    assert "end at different times" in done.stderr


RECIPES = {
    "gap_replay/sft/7b.yaml": (64, "a100-80g:8x8"),
    "biomed_llama/instruct/mixture_a.yaml": (8, "a100-80g:1x8"),
    "biomed_llama/instruct/mixture_b.yaml": (8, "a100-80g:1x8"),
    "biomed_llama/instruct/one_task.yaml": (8, "a100-80g:1x8"),
    "gap_replay/sft/70b.yaml": (128, "a100-80g:16x8"),
    "medalpaca/alpaca_7b.yaml": (4, "a100-80g:1x4"),
    "medalpaca/alpaca_7b_lora.yaml": (1, "a100-80g:1x1"),
    "medalpaca/alpaca_13b.yaml": (4, "a100-80g:1x4"),
    "medalpaca/alpaca_13b_lora.yaml": (1, "a100-80g:1x1"),
    "medalpaca/medalpaca_7b.yaml": (8, "a100-80g:1x8"),
    "medalpaca/medalpaca_7b_lora.yaml": (8, "a100-80g:1x8"),
    "medalpaca/medalpaca_13b.yaml": (8, "a100-80g:1x8"),
    "medalpaca/medalpaca_13b_lora.yaml": (8, "a100-80g:1x8"),
    **{
        f"medalpaca/medalpaca_{size}_lora_{base}.yaml": (1, "a100-40g:1x1")
        for size in ("7b", "13b")
        for base in ("int8", "nf4")
    },
    **{f"biomedlm/finetune/{task}.yaml": (8, "a100-80g:1x8") for task in ("medqa", "pubmedqa", "bioasq", "meqsum")},
}
STARTED = {
    "gap_replay/sft/70b.yaml",
    "biomed_llama/instruct/mixture_b.yaml",
    "medalpaca/alpaca_7b.yaml",
    "medalpaca/medalpaca_7b_lora.yaml",
    "medalpaca/medalpaca_7b_lora_int8.yaml",
    "medalpaca/medalpaca_7b_lora_nf4.yaml",
    "biomedlm/finetune/medqa.yaml",
}
"""Those that are started dry; the others differ from one of them in size or data only."""
FEWER_LAYERS = {name: ("--model.num_layers", 6) for name in STARTED if not name.startswith("gap_replay")}
"""Without a pipeline every layer is like the one before."""


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_planned_and_started_dry(name: str) -> None:
    ranks, cluster = RECIPES[name]
    recipe = REPOSITORY / "examples" / name
    planned = python("tools/plan.py", recipe, "--cluster", cluster)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "fits:" in planned.stdout
    if name not in STARTED:
        return
    place = ("--world-size", ranks, "--rank", ranks // 2, "--micro-batches", 1, *FEWER_LAYERS.get(name, ()))
    dry = python("-m", "megatron_med.train", recipe, "--dry-run", *place)
    assert dry.returncode == 0, dry.stderr
    assert dry.stderr == ""
    assert "absent: " in dry.stdout


def test_meditrons_sets_come_from_its_script(
    shared: Path, tokenizer: Path, tmp_path: Path, forked_environment: dict[str, str]
) -> None:
    """A toy run of each: MedQA by letter and PubMedQA explained, from raw file to a trained model."""
    for task, kind, raw, wanted in (
        (
            "medqa",
            "answer",
            "medqa_us_4opt_a.jsonl",
            r"select one correct answer from A to E\. .*The answer is:\n<\|im_end",
        ),
        (
            "pubmedqa",
            "explained",
            "pubmedqa_pqal_train500.json",
            r"statement is correct\? .*The answer is: (yes|no|maybe) ###",
        ),
        (
            "medmcqa",
            "explained",
            "medmcqa_dev_a.jsonl",
            r"entrance exam questions\. .*The answer is: [A-D] ###<\|im_end",
        ),
    ):
        command = ["bash", "examples/gap_replay/sft/prepare.sh", task, kind, shared / "qa" / raw]
        done = subprocess.run(
            list(map(str, [*command, tmp_path / task, tokenizer])),
            cwd=REPOSITORY,
            env=forked_environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        for text in _texts(tmp_path / task, tokenizer)[:30]:
            assert re.search(wanted, text, re.DOTALL), text
    done = train(
        REPOSITORY / "examples" / "gap_replay" / "sft" / "7b.yaml",
        *("--model.preset", "llama-tiny", "--model.vocab_size", 514, "--model.num_layers", 2),
        *("--model.max_position_embeddings", 1024, "--data.sequence_length", 1024, "--parallel.tensor", 1),
        *("--data.train", f"[{{path: {tmp_path}/medqa}}]", "--data.valid", f"[{{path: {tmp_path}/medqa}}]"),
        *("--train.epochs", 0.2, "--train.global_batch_size", 16, "--train.output_dir", tmp_path / "run"),
        *("--checkpoint.load", "null", "--train.valid_samples", 16, "--optimizer.lr", 3e-3, "--precision", "fp32"),
    )
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 8
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
