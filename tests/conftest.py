"""Shared fixtures: the data folder beside the repository, and small token files made from the quickstart corpus."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from tests.ranks import start_server
from tests.signals import let_children_be_interrupted

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"
SAMPLE = REPOSITORY / "examples" / "quickstart" / "sample.jsonl"

sys.path.insert(0, str(REPOSITORY))
hypothesis.settings.register_profile(  # shared machines: an example may take long for no reason of its own
    "shared machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared machine")
torch.set_num_threads(1)
let_children_be_interrupted()


gc.disable()  # until all tests are read: what they bring stays


def pytest_collection_finish() -> None:
    """From here on as usual, but what is there is never walked through again."""
    gc.freeze()
    gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the tests that take minutes, too (marker slow)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the slow tests, but with ``--all`` and where a test is named."""
    if not config.getoption("--all") and not any("::" in argument for argument in config.args):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


TOGETHER = (
    "tests/cli/test_adapters.py",
    "tests/cli/test_corpus.py",
    "tests/cli/test_evaluate.py",
    "tests/cli/test_generate.py",
    "tests/cli/test_heads.py",
    "tests/cli/test_instructions.py",
    "tests/cli/test_preprocess.py",
    "tests/cli/test_reports.py",
    "tests/cli/test_slurm.py",
    "tests/cli/test_tuning_recipes.py",
    "tests/distributed/test_checkpoint_topology.py",
    "tests/distributed/test_lora.py",
    "tests/distributed/test_parity.py",
    "tests/distributed/test_quantized.py",
    "tests/golden/test_added_tokens.py",
    "tests/golden/test_chat_templates.py",
    "tests/golden/test_evaluation.py",
    "tests/golden/test_generation.py",
    "tests/golden/test_quantizing_memory.py",
)
"""Modules that make or import something costly once: one worker runs all of their tests."""


class _Scheduler(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.split("::")[0]
        return module if module in TOGETHER else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Deals out the tests one by one, some modules whole."""
    return _Scheduler(config, log)


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


@pytest.fixture(scope="session")
def conversation_data(tmp_path_factory: pytest.TempPathFactory, sample_tokenizer: Path) -> Path:
    """Questions and answers made of the quickstart corpus' sentences; several of them share a sample of 64 tokens."""
    from megatron_med.data.jsonl import read_lines, text_of
    from megatron_med.data.preprocess_instructions import InstructionOptions, preprocess_instructions

    folder = tmp_path_factory.mktemp("conversations")
    sentences = [part for line in read_lines([SAMPLE]) for part in text_of(line, "text").split(". ") if len(part) > 30]
    pairs = zip(sentences[::2], sentences[1::2], strict=False)
    records = [{"question": first[:25], "answer": second[: 8 + len(first) % 40]} for first, second in pairs]
    (folder / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    template = "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\nA:{% else %}{% generation %} "
    template += "{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    (folder / "t.jinja").write_text(template)
    options = [str(sample_tokenizer), str(folder / "t.jinja")]
    preprocess_instructions(InstructionOptions([folder / "c.jsonl"], folder / "conversations", *options))
    return folder / "conversations"


@pytest.fixture(autouse=True, scope="session")
def _own_cache_and_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests never touch the user's cache; the server that test processes are forked from starts with it."""
    os.environ["MEGATRON_MED_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    start_server()


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
