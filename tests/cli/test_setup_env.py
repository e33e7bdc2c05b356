"""``tools/setup_env.sh`` where uv is on the PATH: it installs what pip would, from where pip would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.processes import environment
from tests.conftest import REPOSITORY


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """What a uv that only writes it down is asked for, line by line."""
    log, uv = tmp_path / "asked", tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(f'#!/bin/sh\necho "$SSL_CERT_FILE $@" >> {log}\n')
    uv.chmod(0o755)
    return log


def test_uv_installs_torch_first_from_the_places_that_pip_is_given(asked: Path, tmp_path: Path) -> None:
    places = {"PIP_FIND_LINKS": "/wheels", "PIP_EXTRA_INDEX_URL": "https://more.example", "PIP_CERT": "/our.pem"}
    own = {"MEGATRON_MED_VENV": str(tmp_path / "venv"), "PYTHON": sys.executable, "PIP_NO_COMPILE": "1"}
    env = environment() | places | own | {"PATH": f"{asked.parent / 'bin'}:{environment()['PATH']}"}
    env.pop("PIP_INDEX_URL", None)
    script = ["bash", str(REPOSITORY / "tools" / "setup_env.sh"), "verify"]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == str(tmp_path / "venv"), done.stderr
    lines = asked.read_text().splitlines()
    assert all(
        line.startswith(f"/our.pem pip install --quiet --python {tmp_path / 'venv'}/bin/python ") for line in lines
    )
    assert all("--find-links /wheels --extra-index-url https://more.example" in line for line in lines)
    assert "--compile-bytecode" not in lines[0]
    assert lines[0].endswith(" torch==2.13.0")
    assert lines[-1].endswith(f"--no-build-isolation -e {REPOSITORY}[verify]")
    assert "uv did not" not in done.stderr
