"""Preprocessing at length: killed and resumed, in shards, from compressed files, with tokens of a formatter."""

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
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard

from megatron_med.data import pipeline
from megatron_med.data import preprocess as preprocessing
from megatron_med.data.indexed import IndexedDataset
from megatron_med.data.indexed_writer import IndexedDatasetWriter
from megatron_med.data.jsonl import Shard, Span, read_lines, spans_of
from megatron_med.data.preprocess import PreprocessOptions, preprocess
from megatron_med.tokenizer import load_tokenizer
from tests.cli.processes import python, real_python
from tests.conftest import REPOSITORY, SAMPLE


@pytest.fixture(scope="module")
def text(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Real text in three files: 24 MB of abstracts and guidelines."""
    folder = tmp_path_factory.mktemp("text")
    lines = [line for name in ("abstracts_medline", "abstracts_ccby")
             for line in (shared / "pubmed" / f"{name}.jsonl").read_bytes().splitlines(keepends=True)]  # fmt: skip
    parts = [lines[:5000], lines[5000:5001], lines[5001:]]
    files = [folder / f"{number}.jsonl" for number in range(3)]
    for file, part in zip(files, parts, strict=True):
        file.write_bytes(b"".join(part))
    return files


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> Path:
    return shared / "tokenizers" / "llama2_tokenizer.model"


@pytest.fixture(scope="module")
def whole(text: list[Path], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("whole") / "out"
    preprocess(PreprocessOptions(text, prefix, str(tokenizer), workers=2, append_eod=True))
    return prefix


def _same(one: Path, other: Path) -> bool:
    return all(Path(f"{one}.{end}").read_bytes() == Path(f"{other}.{end}").read_bytes() for end in ("bin", "idx"))


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_med.data import pipeline, preprocess as module
pipeline._SECONDS_BETWEEN_POSITIONS = 0.3
arguments = sys.argv[1:]
module.preprocess(module.PreprocessOptions(
    [Path(name) for name in arguments[3:]], Path(arguments[0]), arguments[1], workers=int(arguments[2]), append_eod=True
))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_half_way_it_goes_on_to_the_same_bytes(
    text: list[Path], tokenizer: Path, whole: Path, tmp_path: Path, workers: int
) -> None:
    prefix = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, prefix, tokenizer, str(workers), *text]
    sizes = []
    for _ in range(2):
        process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
        try:
            journal, deadline = tmp_path / "out.partial.json", time.monotonic() + 100
            before = journal.read_text() if journal.exists() else ""
            while not journal.exists() or journal.read_text() == before:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.01)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        sizes.append(json.loads(journal.read_text())["documents"])
    assert 0 < sizes[0] < sizes[1] < 12424
    assert not (tmp_path / "out.bin").exists(), "nothing under its name before it is whole"
    arguments = ("--output-prefix", prefix, "--tokenizer", tokenizer, "--append-eod", "--workers", 2)
    done = python("tools/preprocess_data.py", "--input", *text, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"went on after {sizes[1]:,} documents" in done.stdout
    assert _same(prefix, whole)
    sides = [json.loads(Path(f"{p}.json").read_text()) for p in (prefix, whole)]
    assert {k: v for k, v in sides[0].items() if k != "tokenizer"} == {
        k: v for k, v in sides[1].items() if k != "tokenizer"
    }
    assert [file.name for file in tmp_path.iterdir() if "partial" in file.name] == []


def test_other_options_or_input_do_not_go_on(text: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    """A journal of another run is no position of this one."""
    with suppress(RuntimeError), IndexedDatasetWriter(tmp_path / "out", "u2", {"a": 1}) as writer:
        writer.add_document([1, 2, 3])
        writer.save_position("after the first")
        writer.add_document([4])
        raise RuntimeError("killed")
    with suppress(RuntimeError), IndexedDatasetWriter(tmp_path / "out", "u2", {"a": 1}) as writer:
        assert (writer.documents, writer.tokens, writer.position) == (1, 3, "after the first")
        raise RuntimeError("killed")
    shutil.copytree(tmp_path, tmp_path / "copy")
    with IndexedDatasetWriter(tmp_path / "copy" / "out", "u2", {"a": 1}) as writer:
        writer.add_document([5, 6])
    found = IndexedDataset(tmp_path / "copy" / "out")
    assert [found.read(number).tolist() for number in range(len(found))] == [[1, 2, 3], [5, 6]]
    with IndexedDatasetWriter(tmp_path / "out", "u2", {"a": 2}) as writer:
        assert (writer.documents, writer.position) == (0, None)
        writer.add_document([7])
    assert IndexedDataset(tmp_path / "out").read(0).tolist() == [7]


def test_two_writers_of_one_prefix_are_refused(tmp_path: Path, sample_tokenizer: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "out", "u2") as writer:
        arguments = ("--input", SAMPLE, "--output-prefix", tmp_path / "out", "--tokenizer", sample_tokenizer)
        done = python("tools/preprocess_data.py", *arguments)
        assert done.returncode == 2
        assert "is being written by another process" in done.stderr
        writer.add_document([1])
    assert len(IndexedDataset(tmp_path / "out")) == 1


@pytest.mark.parametrize("shards", [2, 5, 64])
def test_shards_joined_equal_the_single_run(
    text: list[Path], tokenizer: Path, whole: Path, tmp_path: Path, shards: int
) -> None:
    prefixes = [tmp_path / f"part{number:02d}" for number in range(shards)]
    if shards == 64:  # more parts than some files have lines: by call, not by command
        for number, prefix in enumerate(prefixes):
            options = PreprocessOptions(text, prefix, str(tokenizer), append_eod=True, shard=Shard(number, shards))
            preprocess(options)
    else:
        for number, prefix in enumerate(prefixes):
            done = python(
                "tools/preprocess_data.py", "--input", *text, "--output-prefix", prefix, "--tokenizer", tokenizer,
                "--append-eod", "--workers", 2, "--shard", f"{number}/{shards}",
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
    sizes = [len(IndexedDataset(prefix)) for prefix in prefixes]
    assert max(sizes) < 2.5 * 12424 / shards
    done = python("tools/merge_datasets.py", "--input", *prefixes, "--output-prefix", tmp_path / "all")
    assert done.returncode == 0, done.stderr
    assert _same(tmp_path / "all", whole)
    sides = [json.loads(Path(f"{p}.json").read_text()) for p in (tmp_path / "all", whole)]
    for name in ("documents", "tokens", "characters", "words"):
        assert sides[0][name] == sides[1][name]


def test_every_line_is_in_one_shard_whatever_the_files(text: list[Path], tmp_path: Path) -> None:
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(SAMPLE.read_bytes()))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    files = [SAMPLE, packed, tmp_path / "empty.jsonl", SAMPLE, packed]
    every = [line.content for line in read_lines(files)]
    for count in (1, 2, 3, 7, 50):
        parts = [line.content for i in range(count) for line in read_lines(spans_of(files, Shard(i, count)))]
        assert parts == every


def test_a_resume_enters_a_compressed_file_where_a_plain_one_is_entered(tmp_path: Path) -> None:
    for path in (tmp_path / "a.jsonl.gz", tmp_path / "a.jsonl.zst"):
        pack = gzip.compress if path.suffix == ".gz" else zstandard.ZstdCompressor().compress
        path.write_bytes(pack(SAMPLE.read_bytes()))
        offsets = [line.offset for line in read_lines([SAMPLE])]
        for start in (0, 1, offsets[1], offsets[1] + 1, offsets[100], offsets[-1]):
            plain, packed = ([(line.offset, line.content) for line in read_lines([Span(file, start, None)])]
                             for file in (SAMPLE, path))  # fmt: skip
            assert packed == plain
            assert plain[0][0] == next(offset for offset in offsets if offset >= start)


def test_a_wrong_shard_says_what_is_right(tmp_path: Path, sample_tokenizer: Path) -> None:
    arguments = ("--input", SAMPLE, "--output-prefix", tmp_path / "out", "--tokenizer", sample_tokenizer)
    for shard in ("8/8", "1", "a/b"):
        done = python("tools/preprocess_data.py", *arguments, "--shard", shard)
        assert done.returncode == 2
        assert f"--shard is '{shard}': I/N with I from 0 to N - 1 is needed" in done.stderr


def test_compressed_input_gives_the_same_bytes(tmp_path: Path, sample_tokenizer: Path) -> None:
    content = SAMPLE.read_bytes()
    half = content.index(b"\n", len(content) // 2) + 1
    zstd = zstandard.ZstdCompressor()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(content[:half]) + zstd.compress(content[half:]))
    (tmp_path / "a.jsonl").write_bytes(content)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        preprocess(PreprocessOptions([tmp_path / name], tmp_path / name[2:], str(sample_tokenizer), append_eod=True))
    assert _same(tmp_path / "jsonl", tmp_path / "jsonl.gz")
    assert _same(tmp_path / "jsonl", tmp_path / "jsonl.zst")


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_truncated_input_is_named_and_nothing_is_written(tmp_path: Path, sample_tokenizer: Path, ending: str) -> None:
    pack = gzip.compress if ending == "gz" else zstandard.ZstdCompressor().compress
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(pack(SAMPLE.read_bytes())[:-100])
    arguments = ("--input", path, "--output-prefix", tmp_path / "out", "--tokenizer", sample_tokenizer)
    done = python("tools/preprocess_data.py", *arguments)
    assert done.returncode == 2
    assert f"{path} is cut short" in done.stderr
    assert not list(tmp_path.glob("out*"))
    path.write_bytes(b"not compressed at all")
    done = python("tools/preprocess_data.py", *arguments)
    assert f"{path} is damaged, or not what its name says" in done.stderr


def test_a_bad_line_in_a_compressed_file_has_its_number(tmp_path: Path, sample_tokenizer: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(SAMPLE.read_bytes() + b'{"text": 5}\n'))
    lines = SAMPLE.read_bytes().count(b"\n")
    arguments = ("--input", path, "--output-prefix", tmp_path / "out", "--tokenizer", sample_tokenizer)
    done = python("tools/preprocess_data.py", *arguments, "--workers", 2)
    assert f"{path}:{lines + 1}: 'text' is int, not text" in done.stderr


def test_the_summary_adds_up(text: list[Path], whole: Path, tokenizer: Path, tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for file in text for line in file.read_text(encoding="utf-8").split("\n") if line]
    ids = load_tokenizer(tokenizer).encode_batch(texts)
    side = json.loads(Path(f"{whole}.json").read_text())
    assert side["documents"] == len(texts)
    assert side["tokens"] == sum(map(len, ids)) + len(texts)
    assert side["characters"] == sum(map(len, texts))
    assert side["words"] == sum(len(text.split()) for text in texts)
    done = python(
        "tools/preprocess_data.py", "--input", SAMPLE, "--output-prefix", tmp_path / "s", "--tokenizer", tokenizer
    )
    assert re.search(r"368 documents, [\d,]+ tokens, [\d,.]+ tokens per document, fertility \d\.\d{3}", done.stdout)


def test_tasks_in_flight_are_bounded(text: list[Path], tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader never runs ahead of the workers by more than a few tasks, whatever the size of the input."""
    read = []
    encoding = preprocessing._TextEncoding(str(tokenizer), "text", (), None, "<u2")
    source = pipeline._tasks([*spans_of(text, Shard())], 0, 0)

    def counted() -> object:
        for task in source:
            read.append(task)
            yield task

    encoded = pipeline._encode_all(encoding, 2, counted())
    for taken, _ in enumerate(encoded, start=1):
        assert len(read) - taken <= 2 * pipeline._TASKS_PER_WORKER
        if taken == 12:
            break
    encoded.close()


def test_only_a_formatters_text_has_tokens(shared: Path, tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "tokenizer"
    done = real_python(
        "tools/extend_tokenizer.py", "--tokenizer", tokenizer, "--tokens", "gap_replay", "chatml", "--output", folder
    )
    assert "32,014 pieces; [bib_ref] is 32000, <|im_end|> is 32013" in done.stdout
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "See [bib_ref] A, Kim [/bib_ref]. <|im_start|>user"}) + "\n")
    common = ("--input", path, "--tokenizer", folder)
    for name, options in (("raw", ()), ("markup", ("--markup",))):
        done = python("tools/preprocess_data.py", *common, "--output-prefix", tmp_path / name, *options)
        assert done.returncode == 0, done.stderr
    raw, markup = (IndexedDataset(tmp_path / name).read(0).tolist() for name in ("raw", "markup"))
    assert max(raw) < 32000
    assert [token for token in markup if token >= 32000] == [32000, 32001], "ChatML's stay text even there"
    plain = ("--input", path, "--tokenizer", tokenizer, "--output-prefix", tmp_path / "x")
    done = python("tools/preprocess_data.py", *plain, "--markup")
    assert done.returncode == 2
    assert "has no token [bib_ref]" in done.stderr
    shown = python("tools/inspect_data.py", tmp_path / "markup", "--document", 0).stdout
    assert "See «[bib_ref]» A, Kim «[/bib_ref]». <|im_start|>user" in shown
    shown = python("tools/inspect_data.py", tmp_path / "raw", "--document", 0).stdout
    assert "See [bib_ref] A, Kim [/bib_ref]. <|im_start|>user" in shown


def test_a_packed_sample_is_shown_piece_by_piece(whole: Path) -> None:
    done = python("tools/inspect_data.py", whole, "--sample", 5, "--sequence-length", 1024)
    assert done.returncode == 0, done.stderr
    line = r"^tokens (\d+) to (\d+): document (\d+), its tokens (\d+) to (\d+) of (\d+)$"
    places = [tuple(map(int, found)) for found in re.findall(line, done.stdout, re.MULTILINE)]
    assert places[0][0] == 0
    assert places[-1][1] == 1024
    data = IndexedDataset(whole)
    for begin, end, document, first, last, size in places:
        assert end - begin == last - first
        assert size == len(data.read(document))
    assert all(place[3] == 0 for place in places[1:]), "later documents begin at their beginning"
    done = python("tools/inspect_data.py", whole, "--sample", 5)
    assert done.returncode == 2
    assert "--sample needs --sequence-length" in done.stderr
