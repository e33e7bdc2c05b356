"""Shared fixtures: the data folder beside the repository, and small token files made from the quickstart corpus."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"
SAMPLE = REPOSITORY / "examples" / "quickstart" / "sample.jsonl"

sys.path.insert(0, str(REPOSITORY))
hypothesis.settings.register_profile(  # shared machines: an example may take long for no reason of its own
    "shared machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared machine")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent: real data for this test is not here")
    return SHARED


@pytest.fixture(scope="session")
def sample_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 512 pieces trained on the quickstart corpus."""
    from megatron_med.data.jsonl import read_lines, text_of
    from megatron_med.tokenizer.train import save_tokenizer, train_bpe

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_bpe((text_of(line, "text") for line in read_lines([SAMPLE])), 512), folder)
    return folder


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory: pytest.TempPathFactory, sample_tokenizer: Path) -> Path:
    """Prefix of the quickstart corpus, tokenized."""
    from megatron_med.data.preprocess import PreprocessOptions, preprocess

    prefix = tmp_path_factory.mktemp("data") / "sample"
    preprocess(PreprocessOptions([SAMPLE], prefix, str(sample_tokenizer), append_eod=True))
    return prefix


@pytest.fixture(scope="session")
def sentence_data(tmp_path_factory: pytest.TempPathFactory, sample_tokenizer: Path) -> Path:
    """The quickstart corpus with every sentence as a document: several of them share a sample of 32 tokens."""
    from megatron_med.data.jsonl import read_lines, text_of
    from megatron_med.data.preprocess import PreprocessOptions, preprocess

    folder = tmp_path_factory.mktemp("sentences")
    sentences = [part for line in read_lines([SAMPLE]) for part in text_of(line, "text").split(". ") if part.strip()]
    (folder / "s.jsonl").write_text("".join(json.dumps({"text": part[:60]}) + "\n" for part in sentences))
    options = PreprocessOptions([folder / "s.jsonl"], folder / "sentences", str(sample_tokenizer), append_eod=True)
    preprocess(options)
    return folder / "sentences"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests never touch the user's cache."""
    os.environ["MEGATRON_MED_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds of each stage of the tests: unit, distributed, golden, cli."""
    seconds: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                stage = report.nodeid.split("/")[1] if "/" in report.nodeid else report.nodeid
                seconds[stage] = seconds.get(stage, 0.0) + report.duration
    stages = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in sorted(seconds.items()))
    terminalreporter.write_line(f"seconds per stage: {stages}")
