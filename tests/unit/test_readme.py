"""What the README names is there."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml

import megatron_med
from megatron_med.config.presets import PRESETS
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [
    REPOSITORY / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *REPOSITORY.glob("examples/*/README.md"),
]


def test_readme_opens_with_the_two_commands() -> None:
    first = README.split("```bash")[1].split("```")[0].strip().splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["bash examples/quickstart/run.sh", "bash tests/run.sh"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_named_files_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    scripts = set(re.findall(r"\b((?:tools|examples|tests)/[\w/]+\.(?:py|sh|yaml|sbatch))", text))
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    missing = [name for name in scripts if not (REPOSITORY / name).is_file()]
    missing += [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_named_presets_exist() -> None:
    assert {"llama-tiny", "llama2-7b", "llama2-13b", "llama2-70b", "biomedlm-2.7b"} <= PRESETS.keys()


def test_the_version_is_one() -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == megatron_med.__version__
    assert importlib.metadata.version("megatron_med") == megatron_med.__version__
