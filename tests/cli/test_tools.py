"""The tools as users run them, with good and with bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from megatron_med.data.indexed import IndexedDataset
from megatron_med.tokenizer import load_tokenizer
from tests.cli.processes import REPOSITORY, python, real_python
from tests.conftest import SAMPLE


def test_preprocessing_many_processes_equals_one(tmp_path: Path, sample_tokenizer: Path) -> None:
    common = ("--input", SAMPLE, SAMPLE, "--tokenizer", sample_tokenizer, "--append-eod")
    for workers in (1, 3):
        done = real_python(
            "tools/preprocess_data.py", *common, "--output-prefix", tmp_path / f"w{workers}", "--workers", workers
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "w1.bin").read_bytes() == (tmp_path / "w3.bin").read_bytes()
    assert (tmp_path / "w1.idx").read_bytes() == (tmp_path / "w3.idx").read_bytes()
    data, tokenizer = IndexedDataset(tmp_path / "w3"), load_tokenizer(sample_tokenizer)
    records = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").split("\n") if line]
    assert len(data) == 2 * len(records)
    for document in (0, 17, len(records)):
        ids = data.read(document).tolist()
        assert ids[-1] == tokenizer.eod_id
        assert tokenizer.decode(ids[:-1]) == records[document % len(records)]["text"]
    side = json.loads((tmp_path / "w3.json").read_text())
    assert side["documents"] == len(data)
    assert side["tokens"] == data.token_count
    assert side["tokenizer"]["vocab_size"] == 512


def test_megatron_tokens_come_from_its_own_vocabulary(shared: Path, tmp_path: Path) -> None:
    """The text of Megatron's file, tokenized again by us, gives Megatron's file byte for byte."""
    source = IndexedDataset(shared / "megatron_index" / "meg-gpt2-openwebtext_text_document")
    names = [shared / "megatron_index" / name for name in ("gpt2-tiny-vocab.json", "gpt2-tiny-merges.txt")]
    tokenizer = load_tokenizer(f"{names[0]},{names[1]}")
    with (tmp_path / "text.jsonl").open("w", encoding="utf-8") as file:
        for document in range(200):
            text = tokenizer.decode(source.read(document)[:-1].tolist())
            file.write(json.dumps({"text": text}) + "\n")
    done = python(
        "tools/preprocess_data.py", "--input", tmp_path / "text.jsonl", "--output-prefix", tmp_path / "again",
        "--tokenizer", f"{names[0]},{names[1]}", "--append-eod", "--workers", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = IndexedDataset(tmp_path / "again")
    assert len(again) == 200
    for document in range(200):
        np.testing.assert_array_equal(again.read(document), source.read(document))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "broken', ":2: broken JSON at column"),
        (b'{"text": "\xff\xfe"}', ":2: invalid UTF-8 at byte 10"),
        (b'{"text": ""}', ":2: empty document"),
        (b'{"body": "x"}', ":2: no key 'text'"),
        (b'{"text": 5}', ":2: 'text' is int, not text"),
        (b'{"text": "x", "id": ' + b"7" * 6000 + b"}", ":2: a number of thousands of digits"),
        (b'{"text": "' + b"a b " * 5_000_000 + b'"}', ":2: longer than 16 MiB, as no document should be"),
    ],
)
def test_bad_lines_are_named_or_counted(tmp_path: Path, sample_tokenizer: Path, line: bytes, message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "Fever and cough."}\n' + line + b'\n{"text": "Line one\\u2028line two."}\n')
    arguments = ("--input", path, "--output-prefix", tmp_path / "out", "--tokenizer", sample_tokenizer)
    done = python("tools/preprocess_data.py", *arguments)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert f"{path}{message}" in done.stderr
    assert "--skip-bad-lines" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))
    done = python("tools/preprocess_data.py", *arguments, "--skip-bad-lines")
    assert done.returncode == 0
    assert "left out: 1 line, " in done.stdout
    assert len(IndexedDataset(tmp_path / "out")) == 2


def test_odd_real_abstracts(shared: Path, tmp_path: Path) -> None:
    source = shared / "pubmed" / "abstracts_odd.jsonl"
    tokenizer = shared / "tokenizers" / "llama2_tokenizer.model"
    arguments = ("--input", source, "--output-prefix", tmp_path / "odd", "--tokenizer", tokenizer)
    assert python("tools/preprocess_data.py", *arguments).returncode == 2
    done = python("tools/preprocess_data.py", *arguments, "--skip-bad-lines", "--append-eod")
    assert "left out: 40 lines, empty document" in done.stdout
    data = IndexedDataset(tmp_path / "odd")
    assert len(data) == 136
    ids = load_tokenizer(tokenizer)
    texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").split("\n") if line]
    for document, text in enumerate(text for text in texts if text):
        assert data.read(document).tolist() == [*ids.encode(text), 2]


def test_existing_output_is_never_overwritten_unasked(tmp_path: Path, sample_tokenizer: Path) -> None:
    arguments = ("--input", SAMPLE, "--output-prefix", tmp_path / "out", "--tokenizer", sample_tokenizer)
    assert python("tools/preprocess_data.py", *arguments).returncode == 0
    before = (tmp_path / "out.bin").stat().st_mtime_ns
    done = python("tools/preprocess_data.py", *arguments)
    assert done.returncode == 2
    assert "--overwrite" in done.stderr
    assert (tmp_path / "out.bin").stat().st_mtime_ns == before
    assert python("tools/preprocess_data.py", *arguments, "--overwrite").returncode == 0
    done = real_python("tools/train_tokenizer.py", "--input", SAMPLE, "--vocab-size", 300, "--output", sample_tokenizer)
    assert done.returncode == 2
    assert "--overwrite" in done.stderr


def test_what_is_read_is_never_written_over(tmp_path: Path, sample_tokenizer: Path) -> None:
    notes = tmp_path / "notes.json"
    notes.write_bytes(SAMPLE.read_bytes())
    folder = tmp_path / "tk"
    shutil.copytree(sample_tokenizer, folder)
    kept = {file: file.read_bytes() for file in (notes, folder / "tokenizer.json")}
    for prefix, message in (
        (tmp_path / "notes", "notes.json would be written, and is read"),
        (folder / "tokenizer", "tokenizer.json would be written, and is read"),
    ):
        arguments = (
            "--input",
            notes,
            "--output-prefix",
            prefix,
            "--tokenizer",
            folder / "tokenizer.json",
            "--overwrite",
        )
        done = python("tools/preprocess_data.py", *arguments)
        assert done.returncode == 2
        assert message in done.stderr
    other = tmp_path / "other.json"
    for file in (other, tmp_path / "thesis.bin"):
        file.write_text("[1]")
    for prefix in ("other", "thesis"):
        arguments = ("--input", notes, "--output-prefix", tmp_path / prefix, "--tokenizer", folder, "--overwrite")
        done = python("tools/preprocess_data.py", *arguments)
        assert done.returncode == 2
        assert "is there and is no file of token data" in done.stderr
    assert {file: file.read_bytes() for file in kept} == kept
    common = ("--input", notes, "--tokenizer", folder, "--output-prefix")
    for _ in range(2):
        assert python("tools/preprocess_data.py", *common, tmp_path / "out", "--overwrite").returncode == 0
    merge = ("tools/merge_datasets.py", "--input", tmp_path / "out", "--output-prefix", tmp_path / "out", "--overwrite")
    assert "would be written, and is read" in python(*merge).stderr
    index = tmp_path / "out.idx"
    raw = bytearray(index.read_bytes())
    raw[34:38] = (-1).to_bytes(4, "little", signed=True)
    index.write_bytes(raw)
    assert "holds a document of -1 tokens" in python("tools/inspect_data.py", tmp_path / "out").stderr


def test_numbers_of_a_tokenizer_have_ranges(tmp_path: Path) -> None:
    for options, message in (
        (("--vocab-size", 10**12), "at most 16777216 pieces"),
        (("--vocab-size", 300, "--min-frequency", -1), "it must lie from 0"),
    ):
        done = python("tools/train_tokenizer.py", "--input", SAMPLE, "--output", tmp_path / "t", *options)
        assert done.returncode == 2
        assert message in done.stderr


def test_a_tool_that_is_asked_to_end_leaves_no_process(tmp_path: Path, sample_tokenizer: Path) -> None:
    text = tmp_path / "long.jsonl"
    text.write_bytes(SAMPLE.read_bytes() * 300)
    command = [sys.executable, "tools/preprocess_data.py", "--input", text, "--output-prefix", tmp_path / "out"]
    command += ["--tokenizer", sample_tokenizer, "--workers", "2"]
    process = subprocess.Popen(list(map(str, command)), cwd=REPOSITORY, start_new_session=True, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out.bin.partial").exists() or (tmp_path / "out.bin.partial").stat().st_size == 0:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
        while _members(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert b"Traceback" not in process.stderr.read()  # type: ignore[union-attr]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "out.partial.lock").exists()


def _members(group: int) -> list[str]:
    """Processes of a process group that are not dead."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(entry.parent.name)
    return found


def test_inspect_and_merge(tmp_path: Path, sample_data: Path, shared: Path) -> None:
    done = real_python("tools/inspect_data.py", sample_data)
    assert "368 documents" in done.stdout
    assert "512 pieces" in done.stdout
    done = python("tools/inspect_data.py", sample_data, "--document", 2)
    records = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").split("\n") if line]
    assert records[2]["text"] + "«<|endoftext|>»" in done.stdout
    done = python("tools/inspect_data.py", sample_data, "--document", 368)
    assert done.returncode == 2
    assert "documents 0 to 367" in done.stderr
    merged = tmp_path / "merged"
    merge = ("tools/merge_datasets.py", "--input", sample_data, sample_data, "--output-prefix", merged)
    assert real_python(*merge).returncode == 0
    assert IndexedDataset(merged).token_count == 2 * IndexedDataset(sample_data).token_count
    assert "512 pieces" in python("tools/inspect_data.py", merged).stdout
    assert python(*merge).returncode == 2
    foreign = shared / "megatron_index" / "meg-gpt2-openwebtext_text_document"
    done = python("tools/merge_datasets.py", "--input", sample_data, foreign, "--output-prefix", tmp_path / "m")
    assert done.returncode == 2
    assert "tokenize alike" in done.stderr


def test_missing_inputs(tmp_path: Path, sample_tokenizer: Path) -> None:
    arguments = ("--output-prefix", tmp_path / "out", "--tokenizer", sample_tokenizer)
    done = python("tools/preprocess_data.py", "--input", tmp_path / "a.jsonl", tmp_path / "b.jsonl", *arguments)
    assert done.returncode == 2
    assert done.stderr.count("There is no input file") == 2
    done = python("tools/preprocess_data.py", "--input", tmp_path, *arguments)
    assert done.stderr == f"error: {tmp_path} is a folder: give its files.\n"
    done = python("tools/generate.py", "--checkpoint", tmp_path, "--prompt", "x")
    assert done.returncode == 2
    assert "There is no checkpoint" in done.stderr
    done = python("tools/convert_checkpoint.py", "export", "--from", tmp_path, "--to", tmp_path / "hf")
    assert done.returncode == 2
    done = python("tools/generate.py", "--checkpoint", tmp_path, "--prompt", "x", "--tensor", 2)
    assert done.returncode == 2
    assert "Start with --nproc-per-node 2." in done.stderr


def test_side_file_that_no_longer_fits_is_told(tmp_path: Path, sample_tokenizer: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for file in sample_tokenizer.iterdir():
        (tokenizer / file.name).write_bytes(file.read_bytes())
    arguments = ("--input", SAMPLE, "--output-prefix", tmp_path / "out", "--tokenizer", tokenizer)
    assert python("tools/preprocess_data.py", *arguments).returncode == 0
    file = tokenizer / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    done = python("tools/inspect_data.py", tmp_path / "out", "--document", 0)
    assert done.returncode == 2
    assert "its sha256 differs" in done.stderr


@pytest.mark.parametrize(("content", "options"), [("", ()), ('{"text": ""}\n{"no": 1}\n', ("--skip-bad-lines",))])
def test_a_tokenizer_of_no_text_is_refused(tmp_path: Path, content: str, options: tuple[str, ...]) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    done = python(
        "tools/train_tokenizer.py", "--input", tmp_path / "in.jsonl", "--vocab-size", 300, "--output", tmp_path / "t",
        *options,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no document with text. Nothing was written." in done.stderr
    assert not (tmp_path / "t").exists()
