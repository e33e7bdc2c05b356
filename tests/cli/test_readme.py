"""The README's commands, as they are written, in order, in a fresh clone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.cli.processes import read_metrics
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def _commands() -> str:
    """What stands in the boxes of "The first ten minutes"."""
    section = README.split("## The first ten minutes")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))


def _home(folder: Path) -> Path:
    """A home whose environment is begun, and finds what is installed in this one: nothing has to be fetched."""
    venv = folder / ".cache" / "megatron_med" / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=120)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (venv / "lib" / version / "site-packages" / "installed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_first_ten_minutes_are_as_they_are_written(tmp_path: Path) -> None:
    clone, commands = tmp_path / "clone", _commands()
    for name in ("train-tokenizer", "preprocess", "train --nproc-per-node", "export", "adapter", "evaluate", "plan"):
        assert f"megatron-med {name}" in commands
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(clone)], check=True, timeout=60)
    changed = subprocess.run(["git", "diff", "HEAD"], cwd=REPOSITORY, capture_output=True, check=True, timeout=60)
    subprocess.run(["git", "apply", "--allow-empty"], cwd=clone, input=changed.stdout, check=True, timeout=60)
    of_tests = ("MEGATRON_MED_", "PYTEST", "OMP_", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(of_tests)}
    environment |= {"HOME": str(_home(tmp_path / "home")), "PYTHON": sys.executable}
    script = f"set -euo pipefail\n{commands}"
    done = subprocess.run(
        ["bash"], input=script, cwd=clone, env=environment, capture_output=True, text=True, timeout=1100, check=False
    )
    told = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, told
    assert "Traceback" not in done.stderr, told
    out = clone / "out"
    losses = [line["loss"] for line in read_metrics(out / "first")]
    assert len(losses) == 50
    assert losses[-1] < losses[0] - 1
    assert len(read_metrics(out / "adapters")) == 10
    assert done.stdout.count("verified: logits") == 3
    assert (out / "results" / "report.html").is_file()
    assert any(row["system"] for row in json.loads((out / "comparison" / "comparison.json").read_text())["rows"])
    assert "MFU" in done.stdout
    assert "rank 77" in done.stdout
