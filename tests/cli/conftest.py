"""The interpreter that scripts and launchers get in these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.forked_python import forked_python, with_python_of
from tests.cli.processes import environment


@pytest.fixture(scope="session")
def _forked() -> Iterator[dict[str, str]]:
    with forked_python(environment()) as venv:
        yield with_python_of(venv)


@pytest.fixture
def forked_environment(_forked: dict[str, str]) -> dict[str, str]:
    """For a script: its ``python``, ``torchrun`` and ``megatron-med`` are forked, and so are torchrun's ranks."""
    return environment() | _forked


@pytest.fixture
def forked_ranks(_forked: dict[str, str]) -> dict[str, str]:
    """For a real torchrun: its ranks are forked."""
    return {"PYTHON_EXEC": _forked["PYTHON_EXEC"]}
