"""Recipes and raw files with faults: one clear message each, and nothing half done."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import pytest
import yaml
import zstandard

pytest.importorskip("datatrove", reason="the corpus extra is not installed")

from tests.cli.processes import python
from tests.corpora import recipe_source, write_lines


def test_a_source_that_others_have_whole_is_named(tmp_path: Path) -> None:
    record = {"title": "Aspirin", "text": "Aspirin lowers fever in adults and relieves mild pain within an hour."}
    write_lines(tmp_path / "a.jsonl", [record])
    write_lines(tmp_path / "b.jsonl", [record | {"id": "other"}])
    sources = {name: recipe_source("guidelines", [tmp_path / f"{name}.jsonl"], "CC0") for name in "ab"}
    path = tmp_path / "corpus.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "out"), "sources": sources}))
    done = python("tools/build_corpus.py", path)
    assert done.returncode == 2
    assert "sources.b has no document left (1 same text)" in done.stderr


def test_what_the_build_depends_on_may_not_change(tmp_path: Path) -> None:
    record = {"title": "Aspirin", "text": "Aspirin lowers fever in adults and relieves mild pain within an hour."}
    write_lines(tmp_path / "a.jsonl", [record])
    write_lines(tmp_path / "exam.jsonl", [{"question": "Which drug lowers fever in adults within one hour of time?"}])
    content = {
        "output": str(tmp_path / "out"),
        "sources": {"a": recipe_source("guidelines", [tmp_path / "a.jsonl"], "CC0")},
        "quality": {"questions": {"exam": {"path": str(tmp_path / "exam.jsonl"), "fields": ["question"]}}},
    }
    path = tmp_path / "corpus.yaml"
    path.write_text(yaml.safe_dump(content))
    assert python("tools/build_corpus.py", path).returncode == 0
    write_lines(tmp_path / "exam.jsonl", [{"question": "Which drug lowers fever in adults within two hours of time"}])
    done = python("tools/build_corpus.py", path)
    assert done.returncode == 2
    assert "(changed: files)" in done.stderr


GOOD = {"id": "1", "title": "Aspirin", "text": "Aspirin lowers fever in adults and relieves mild pain within an hour."}


def _bad(name: str, folder: Path) -> Path:
    good = (json.dumps(GOOD) + "\n").encode()
    path = folder / {"gzip": "a.jsonl.gz", "zstd": "a.jsonl.zst", "plain": "a.jsonl"}.get(name.split()[0], "a.jsonl")
    many = b"".join((json.dumps(GOOD | {"id": str(i), "text": f"{i} {os.urandom(50).hex()}"}) + "\n").encode()
                    for i in range(2000))  # fmt: skip
    content = {
        "gzip cut": gzip.compress(many)[:-5000],
        "gzip plain": many,
        "zstd cut": zstandard.ZstdCompressor().compress(many)[:-5000],
        "plain utf8": good + b'{"id": "2", "title": "x", "text": "\xff\xfe"}\n',
        "plain json": good + b'{"id": "2", "title"\n',
        "plain field": good + b'{"pmid": "2", "title": "x", "abstract": "y"}\n',
        "plain type": good + b'{"id": "2", "title": "x", "text": ["y"]}\n',
        "plain empty": b'{"id": "1", "title": "x", "text": ""}\n{"id": "2", "title": "x", "text": null}\n',
    }[name]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gzip cut", r"a.jsonl.gz is cut short \(.*\): fetch or write it again"),
        ("gzip plain", r"a.jsonl.gz is damaged, or not what its name says"),
        ("zstd cut", r"a.jsonl.zst is cut short"),
        ("plain utf8", r"a.jsonl:2: invalid UTF-8 at byte"),
        ("plain json", r"a.jsonl:2: broken JSON at column"),
        ("plain field", r"a.jsonl:2: no field 'id' \(there are: abstract, pmid, title\)"),
        ("plain type", r"a.jsonl:2: 'text' is a list, not text"),
        ("plain empty", r"sources.abstracts yields no document \(2 read, 2 no text\)"),
    ],
)
def test_bad_input_is_one_clear_message(tmp_path: Path, name: str, message: str) -> None:
    source = recipe_source("abstracts", [_bad(name, tmp_path)], "CC0")
    path = tmp_path / "corpus.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "out"), "sources": {"abstracts": source}}))
    done = python("tools/build_corpus.py", path)
    assert done.returncode == 2, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    if name in ("plain utf8", "plain json", "plain field", "plain type"):
        path.write_text(path.read_text() + "bad_records: skip\n")
        done = python("tools/build_corpus.py", path, "--output", tmp_path / "skipping")
        assert done.returncode == 0, done.stderr
        steps = json.loads((tmp_path / "skipping" / "manifest.json").read_text())["inputs"][0]["steps"]
        assert steps[0] == {"step": "raw records", "before": 2, "after": 1, "removed": {"bad record": 1}}


def test_a_recipe_with_faults_names_them_all(tmp_path: Path, shared: Path) -> None:
    path = tmp_path / "corpus.yaml"
    path.write_text(
        "output: out\nsedd: 3\nsources:\n  a: {kind: s2orcc, input: [nowhere/*.jsonl], license: x, valid: 1.5}\n"
        "  b: {kind: guidelines, license: x}\nquality: {n_grams: lots}\n"
    )
    done = python("tools/build_corpus.py", path)
    assert done.returncode == 2
    for message in (
        "sedd is not an option: did you mean seed?",
        "sources.a.kind is 's2orcc': expected one of s2orc, s2ag_abstracts",
        "sources.b.input is missing",
        "quality.n_grams is 'lots': expected a whole number",
    ):
        assert message in done.stderr
    path.write_text(
        "output: out\nsources:\n  a: {kind: s2orc, input: [nowhere/*], license: x, valid: 1.5}\n"
        "quality: {language: english, personal_data: {e-mail: redact}, questions: {a/b: {path: x, fields: [q]}}}\n"
    )
    done = python("tools/build_corpus.py", path)
    assert "sources.a.input: no file matches nowhere/*" in done.stderr
    assert "sources.a.valid is 1.5" in done.stderr
    assert "quality.language is 'english': a code of two letters" in done.stderr
    assert "quality.personal_data.e-mail is not looked for: email, phone, record_number, name are" in done.stderr
    assert "quality.questions.a/b: a name may hold letters, digits and underscores" in done.stderr
