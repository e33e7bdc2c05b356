"""The corpus builder as users run it: the whole mixture from real records, killed and resumed, and with bad input."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("datatrove", reason="the corpus extra is not installed")

from megatron_med.corpus.blocks import fraction_of
from megatron_med.corpus.records import read_records
from megatron_med.data.indexed import IndexedDataset
from megatron_med.data.sources import recorded_tokenizer
from megatron_med.tokenizer.special import CORPUS_TOKENS
from tests.cli.processes import python, real_python
from tests.conftest import REPOSITORY
from tests.corpora import recipe_source, write_lines
from tests.unit.test_corpus_cleaning import pubmed_xml

SOURCES = ("guidelines", "papers", "abstracts", "xml", "replay")
XML_RECORDS = 400


def _planted(shared: Path) -> list[dict[str, Any]]:
    """Records that some step must remove or change, made from real text."""
    abstracts = [record for _, record in read_records(shared / "pubmed" / "abstracts_medline.jsonl")][:3]
    question = next(r for _, r in read_records(shared / "qa" / "medqa_us_4opt_a.jsonl"))["question"]
    french = next(r for _, r in read_records(shared / "pubmed" / "non_english_fr.jsonl"))["text"]
    long, other, third = (record["text"] for record in abstracts)
    texts = {
        "near": long.replace(".", ". ", 1) + " Further work is needed.",
        "exact": f"  {abstracts[1]['title']}  {other}",
        "question": f"A case for teaching. {question} Discuss.",
        "french": french,
        "record": f"{third}\nMRN: 00412-7781",
        "mail": "Correspondence: jane.doe@hospital.org. " + " ".join(sorted(third.split())),
        "token": "The [table] below has [formula] in it. " + " ".join(sorted(other.split())),
    }
    records = [{"id": f"planted-{name}", "title": "", "text": text} for name, text in texts.items()]
    return [
        *records,
        {
            "id": "planted-mail",
            "title": "",
            "text": "Another English text that stands under an id which the record above it has already taken.",
        },
    ]


@pytest.fixture(scope="module")
def recipe(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of source, on the real records of the shared data folder; of MEDLINE's abstracts a sixth."""
    folder = tmp_path_factory.mktemp("raw")
    abstracts = [record for _, record in read_records(shared / "pubmed" / "abstracts_medline.jsonl")]
    (folder / "medline").mkdir()
    medline = folder / "medline" / "abstracts.jsonl"
    write_lines(medline, abstracts[:3] + abstracts[3::6])  # the first ones are those of the planted records
    write_lines(folder / "planted.jsonl", _planted(shared))
    records = [record for _, record in read_records(shared / "pubmed" / "abstracts_ccby.jsonl")]
    (folder / "baseline.xml.gz").write_bytes(gzip.compress(pubmed_xml(records[:XML_RECORDS]).encode()))
    write_lines(folder / "ccby.jsonl", records[XML_RECORDS::3])
    qa = {
        "medqa": (shared / "qa" / "medqa_us_4opt_a.jsonl", ["question"]),
        "pubmedqa": (shared / "qa" / "pubmedqa_pqal_train500.json", ["QUESTION", "LONG_ANSWER"]),
    }
    s2orc, pubmed = shared / "s2orc", shared / "pubmed"
    content = {
        "output": str(folder / "unused"),
        "sources": {
            "guidelines": recipe_source("guidelines", [shared / "guidelines" / "*.jsonl"], "CC BY 4.0", valid=0.05),
            "papers": recipe_source(
                "s2orc",
                [s2orc / "s2orc_real.jsonl", s2orc / "s2orc_from_jats.jsonl"],
                "ODC-BY 1.0",
                catalogue=[str(s2orc / "papers_from_jats.jsonl"), str(s2orc / "s2ag_papers_sample.jsonl")],
                valid=0.03,
            ),
            "abstracts": recipe_source(
                "abstracts",
                [medline, pubmed / "abstracts_odd.jsonl", folder / "*.jsonl"],
                "MEDLINE",
                valid=0.03,
            ),
            "xml": recipe_source("pubmed_xml", [folder / "baseline.xml.gz"], "MEDLINE", valid=0.03),
            "replay": recipe_source("redpajama", [shared / "replay" / "*.jsonl"], "CC BY-SA 3.0", share=0.5),
        },
        "quality": {"questions": {name: {"path": str(path), "fields": keys} for name, (path, keys) in qa.items()}},
        "tokenization": {"tokenizer": str(shared / "tokenizers" / "llama2_tokenizer.model")},
    }
    path = folder / "corpus.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def corpus(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "out"
    done = real_python("tools/build_corpus.py", recipe, "--output", folder, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "tokenize-join" in done.stdout
    assert done.stderr == ""
    return folder


def _documents(corpus: Path, source: str, split: str) -> list[dict[str, Any]]:
    return [record for shard in sorted((corpus / f"{source}-{split}").glob("*")) for _, record in read_records(shard)]


def _all(corpus: Path) -> list[dict[str, Any]]:
    return [
        record for source in SOURCES for split in ("train", "valid") for record in _documents(corpus, source, split)
    ]


def _removed(corpus: Path) -> dict[str, dict[str, Any]]:
    files = sorted((corpus / "work" / "removed").rglob("*.zst"))
    return {record["id"]: record["metadata"] for file in files for _, record in read_records(file)}


def test_each_document_is_there_once(corpus: Path, shared: Path) -> None:
    documents = _all(corpus)
    ids = [document["id"] for document in documents]
    assert len(set(ids)) == len(ids)
    texts = {re.sub(r"\W+", "", document["text"]).lower() for document in documents}
    assert len(texts) == len(documents)
    pmids = Counter(d["metadata"].get("pmid") or d["id"].removeprefix("pubmed:") for d in documents)
    assert pmids.most_common(1)[0][1] == 1, "no PubMed id twice"


def test_an_abstract_stays_only_where_the_full_text_is_absent(corpus: Path, shared: Path) -> None:
    papers = [record for _, record in read_records(shared / "s2orc" / "s2orc_from_jats.jsonl")]
    full = {f"pubmed:{record['externalids']['pubmed']}" for record in papers}
    kept = {document["id"] for source in ("abstracts", "xml") for split in ("train", "valid")
            for document in _documents(corpus, source, split)}  # fmt: skip
    raw = {f"pubmed:{record['id']}" for _, record in read_records(shared / "pubmed" / "abstracts_ccby.jsonl")}
    assert len(raw & full) > 100, "the data has both of many papers"
    assert not kept & full
    titles = [document["text"].split("\n\n")[0] for document in _documents(corpus, "papers", "train")]
    assert any("chlamydia testing" in title for title in titles), "the join on corpus id brings titles"


def test_planted_records_are_removed_and_the_reason_is_kept(corpus: Path) -> None:
    removed, kept = _removed(corpus), {document["id"]: document for document in _all(corpus)}
    reasons = {name: removed.get(f"pubmed:planted-{name}", {}).get("filter_reason") for name in
               ("near", "exact", "question", "french", "record")}  # fmt: skip
    assert reasons == {
        "near": "near duplicate",
        "exact": "same text",
        "question": "contaminated: medqa",
        "french": "language fr",
        "record": "personal data: record_number",
    }
    assert removed["pubmed:planted-question"]["contamination"]["question"] == 0
    assert len(removed["pubmed:planted-question"]["contamination"]["words"].split()) == 13
    assert removed["pubmed:planted-mail"]["filter_reason"] == "same id", "of two texts under one id the first stays"
    assert "<email>" in kept["pubmed:planted-mail"]["text"]
    assert "jane.doe" not in kept["pubmed:planted-mail"]["text"]
    assert kept["pubmed:planted-token"]["text"].startswith("The (table) below has (formula)")


def test_splits_hold_out_the_published_shares(corpus: Path) -> None:
    for source, share in {"guidelines": 0.05, "papers": 0.03, "abstracts": 0.03, "replay": 0.0}.items():
        train, valid = (len(_documents(corpus, source, split)) for split in ("train", "valid"))
        expected = share * (train + valid)
        assert abs(valid - expected) <= 4 * (expected + 1) ** 0.5, source
        assert (valid == 0) == (share == 0)


def test_replay_is_drawn_by_the_hash_of_the_text(corpus: Path, shared: Path) -> None:
    raw = [record for _, record in read_records(shared / "replay" / "wikitext2_valid_articles.jsonl")]
    kept = [document["id"] for document in _documents(corpus, "replay", "train")]
    assert 0.25 * len(raw) < len(kept) < 0.75 * len(raw)
    assert all(fraction_of(1234, "share", name) < 0.5 for name in kept)
    manifest = json.loads((corpus / "manifest.json").read_text())
    steps = next(item["steps"] for item in manifest["inputs"] if item["source"] == "replay")
    assert steps[0] == {
        "step": "raw records",
        "before": 60,
        "after": len(kept),
        "removed": {"not drawn": 60 - len(kept)},
    }


def test_the_manifest_accounts_for_every_record(corpus: Path, shared: Path) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert re.match(r"\d+\.\d+\.\d+", manifest["code"])
    for item in manifest["inputs"]:
        first, steps = item["steps"][0], item["steps"]
        if item["file"].endswith(".jsonl"):
            assert first["before"] == sum(1 for _ in read_records(Path(item["file"])))
        for before, after in zip(steps, [*steps[1:], None], strict=True):
            assert before["before"] - sum(before["removed"].values()) == before["after"]
            assert after is None or after["before"] == before["after"]
        kept = sum(s["documents"] for s in manifest["shards"] if s["made_from"] == item["file"])
        assert kept == steps[-1]["after"]
    by_license = Counter()
    for shard in manifest["shards"]:
        assert shard["sha256"]
        by_license.update(shard["licenses"])
    assert by_license["CC BY 4.0"] > 1000
    assert sum(by_license.values()) == len(_all(corpus))
    found = [step.get("found", {}) for item in manifest["inputs"] for step in item["steps"]]
    assert sum(item.get("phone", 0) for item in found) > 50


def test_token_files_hold_the_text_with_its_tokens(corpus: Path) -> None:
    for source in SOURCES:
        data, tokenizer = IndexedDataset(corpus / f"{source}-train"), recorded_tokenizer(corpus / f"{source}-train")
        assert tokenizer is not None
        assert tokenizer.vocab_size == 32012
        documents = _documents(corpus, source, "train")
        assert len(data) == len(documents)
        for number in range(0, len(documents), 97):
            ids = data.read(number).tolist()
            assert ids[-1] == tokenizer.eod_id
            assert tokenizer.decode(ids[:-1]) == documents[number]["text"]
        tokens = Counter(int(token) for number in range(len(data)) for token in data.read(number) if token >= 32000)
        written = sum(document["text"].count(token) for document in documents for token in CORPUS_TOKENS)
        assert sum(tokens.values()) == written
        assert bool(written) == (source == "papers")


def _digests(corpus: Path) -> dict[str, bytes]:
    files = [*corpus.glob("*.bin"), *corpus.glob("*.idx"), *corpus.glob("*-*/*.zst")]
    return {str(file.relative_to(corpus)): file.read_bytes() for file in files}


def test_killed_and_started_again_it_is_the_same_corpus(
    corpus: Path, recipe: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Killed (twice with ``--all``), finished with another number of workers: same bytes, and what was finished is left
    alone."""
    folder = tmp_path / "again"
    command = [sys.executable, "tools/build_corpus.py", str(recipe), "--output", str(folder), "--workers", "1"]
    stages = ["extract-abstracts/completions/00001", "finish/completions/00002"]
    for stage in stages if pytestconfig.getoption("--all") else stages[1:]:
        mark = folder / "work" / "logs" / stage
        process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 200
            while not mark.exists():
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    before = {p: p.stat().st_mtime_ns for p in (folder / "work" / "logs").glob("*/completions/*")}
    done = python("tools/build_corpus.py", recipe, "--output", folder, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "extract-guidelines: done before" in done.stdout
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items())
    assert _digests(folder) == _digests(corpus)
    done = python("tools/build_corpus.py", recipe, "--output", folder)
    assert done.stdout.count("done before") == len(done.stdout.splitlines())


def test_parts_can_be_built_one_by_one(recipe: Path, tmp_path: Path) -> None:
    listed = python("tools/build_corpus.py", recipe, "--list")
    assert re.search(r"extract-papers +2 tasks", listed.stdout)
    done = python(
        "tools/build_corpus.py", recipe, "--output", tmp_path / "out", "--stage", "questions", "extract-guidelines"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "questions: 1 of 1 tasks\nextract-guidelines: 1 of 1 tasks\n"
    assert (tmp_path / "out" / "work" / "extracted" / "guidelines" / "00000.jsonl.zst").is_file()
    done = python("tools/build_corpus.py", recipe, "--output", tmp_path / "out", "--stage", "extract-books")
    assert done.returncode == 2
    assert "names no stage. There are: catalogue, catalogue-join, questions, extract-guidelines" in done.stderr
    done = python(
        "tools/build_corpus.py", recipe, "--output", tmp_path / "out", "--stage", "duplicates", "extract-papers"
    )
    assert done.returncode == 2
    assert "extract-papers needs catalogue, catalogue-join, not finished yet" in done.stderr
    assert "duplicates needs catalogue, catalogue-join, extract-abstracts, extract-xml, extract-replay" in done.stderr


def test_a_shard_that_was_lost_between_stages_is_noticed(recipe: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(recipe.read_text())
    tree["sources"] = {"guidelines": tree["sources"]["guidelines"]}
    path = tmp_path / "corpus.yaml"
    path.write_text(yaml.safe_dump(tree | {"quality": {"near_duplicates": False}, "tokenization": None}))
    arguments = ("tools/build_corpus.py", path, "--output", tmp_path / "out")
    assert python(*arguments, "--stage", "extract-*", "duplicates").returncode == 0
    shard = tmp_path / "out" / "work" / "extracted" / "guidelines" / "00000.jsonl.zst"
    shard.unlink()
    done = python(*arguments)
    assert done.returncode == 2
    assert f"{shard} holds 0 documents and held 1,037 when it was written" in done.stderr
    assert "Traceback" not in done.stderr
    shutil.rmtree(tmp_path / "out" / "work" / "logs" / "extract-guidelines")
    assert python(*arguments).returncode == 0


def test_a_corpus_that_no_longer_matches_its_manifest_is_named(corpus: Path, tmp_path: Path, recipe: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(corpus, folder)
    verify = ("tools/build_corpus.py", recipe, "--output", folder, "--verify")
    assert "shards are as the manifest says" in python(*verify).stdout
    (folder / "replay-train.idx").unlink()
    (folder / "papers-train.bin").write_bytes((folder / "papers-train.bin").read_bytes() + b"xx")
    first, second, *_ = sorted(folder.glob("*-train/*.zst"))
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    second.rename(second.with_name("99999.jsonl.zst"))
    done = python(*verify)
    assert done.returncode == 2
    assert f"{first} is not the file that manifest.json describes" in done.stderr
    assert f"{second} is in manifest.json and not on disk" in done.stderr
    assert "99999.jsonl.zst is not in manifest.json" in done.stderr
    assert f"{folder / 'replay-train.idx'} is in manifest.json and not on disk" in done.stderr
    assert f"{folder / 'papers-train.bin'} is not the file" in done.stderr
    done = python("tools/build_corpus.py", recipe, "--output", folder)
    assert done.returncode == 2, "a finished corpus that has lost a file is not passed over"
    assert f"{folder / 'replay-train.idx'} is in manifest.json and not on disk" in done.stderr
    done = python("tools/corpus_report.py", folder)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_another_recipe_in_the_same_folder_is_refused(recipe: Path, tmp_path: Path) -> None:
    arguments = ("--output", tmp_path / "out", "--stage", "questions")
    assert python("tools/build_corpus.py", recipe, *arguments).returncode == 0
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text().replace("valid: 0.05", "valid: 0.06"))
    done = python("tools/build_corpus.py", other, *arguments)
    assert done.returncode == 2
    assert "was begun with another recipe or other files (changed: sources)" in done.stderr


def test_the_report_opens_in_a_browser(corpus: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = real_python("tools/corpus_report.py", corpus, "--output", page)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert not re.search(r"(?:src|href)=[\"']?https?://", text), "nothing is fetched from elsewhere"
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        f"--user-data-dir={tmp_path}/p",
    ]
    run = [browser, *flags, "--dump-dom", f"file://{page}"]
    dom = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True).stdout
    for section in (
        "sources",
        "lengths",
        "languages",
        "duplicates",
        "benchmark-questions",
        "top-words",
        "removed-text",
    ):
        assert f'<section id="{section}">' in dom
    assert dom.count("<svg") == 5
    for source in SOURCES:
        assert f">{source}</td>" in dom or f"<td>{source}" in dom
    assert "same PubMed, PMC or corpus id" in dom
    assert "<mark>" in dom, "the words that a benchmark question shares"
    assert dom.count("<details>") > 5
    shot = tmp_path / "page.png"
    subprocess.run([browser, *flags, f"--screenshot={shot}", "--window-size=1200,3000", f"file://{page}"],
                   capture_output=True, timeout=120, check=True)  # fmt: skip
    from matplotlib.image import imread

    picture = imread(shot)
    assert picture.shape[0] == 3000
    assert len({tuple(colour) for colour in (picture[::7, ::7].reshape(-1, picture.shape[2]) * 255).astype(int)}) > 50


@pytest.mark.slow
def test_from_raw_records_to_a_training_run(shared: Path, tmp_path: Path, forked_environment: dict[str, str]) -> None:
    """The README's walk: a folder for each source, one command."""
    raw = tmp_path / "raw"
    files = {
        "guidelines": [shared / "guidelines" / "nih_guidelines.jsonl"],
        "s2orc": [shared / "s2orc" / name for name in ("s2orc_real.jsonl", "s2orc_from_jats.jsonl")],
        "papers": [shared / "s2orc" / "papers_from_jats.jsonl"],
        "redpajama": [shared / "replay" / "wikitext2_valid_articles.jsonl"],
    }
    for folder, paths in files.items():
        (raw / folder).mkdir(parents=True)
        for path in paths:
            (raw / folder / path.name).symlink_to(path)
    (raw / "llama2").mkdir()
    (raw / "llama2" / "tokenizer.model").symlink_to(shared / "tokenizers" / "llama2_tokenizer.model")
    (raw / "pubmed").mkdir()
    records = [record for _, record in read_records(shared / "pubmed" / "abstracts_ccby.jsonl")][:XML_RECORDS]
    (raw / "pubmed" / "pubmed26n0001.xml.gz").write_bytes(gzip.compress(pubmed_xml(records).encode()))
    command = ["bash", "examples/gap_replay/sample.sh", "--raw", str(raw), "--work", str(tmp_path / "work")]
    command += ["--steps", "6"]
    done = subprocess.run(command, cwd=REPOSITORY, env=forked_environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "work" / "runs" / "gap_replay_sample"
    losses = [step["loss"] for step in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert (tmp_path / "work" / "data" / "gap_replay_sample" / "report.html").is_file()
    wrong = subprocess.run(
        [*command[:2], "--raw", "/nowhere"], cwd=REPOSITORY, env=forked_environment, capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert "error: there is no /nowhere" in wrong.stderr


def test_the_recipes_weights_are_the_published_tokens() -> None:
    """Millions of training tokens of table 1, the same in every recipe, with the shares that the README prints."""
    published = {"guidelines": 107, "abstracts": 5480, "papers": 40700, "replay": 420}
    folder = REPOSITORY / "examples" / "gap_replay"
    for name in ("7b", "13b", "70b", "sample_run"):
        train = yaml.safe_load((folder / f"{name}.yaml").read_text())["data"]["train"]
        assert {Path(item["path"]).name.removesuffix("-train"): item["weight"] for item in train} == published
    readme, total, samples = (folder / "README.md").read_text(), sum(published.values()), 23_000 * 512
    for name, weight in published.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| {name} | {weight:,}M"))
        assert f"{100 * weight / total:.2f} %" in row
        assert f"{round(samples * weight / total):,}" in row
    assert total == 46_707
    assert load_recipe_sources(folder / "corpus.yaml") == set(published)


def load_recipe_sources(path: Path) -> set[str]:
    return set(yaml.safe_load(path.read_text())["sources"])
