"""What the tests start: forked with everything loaded, and killed with all that it has started."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cli.processes import python, started_forked

LEAVES_A_CHILD = """
import os, sys, time
from pathlib import Path
child = os.fork()
if child == 0:
    time.sleep(300)
Path(sys.argv[1]).write_text(str(child))
{ending}
"""


def test_a_forked_command_has_torch_and_transformers_loaded() -> None:
    """Else every one of them would take seconds to import them, and nobody would be told."""
    loaded = python("-c", "import sys; print('torch' in sys.modules, 'transformers' in sys.modules)")
    assert loaded.stdout == "True True\n", loaded.stderr


def test_a_forked_command_ends_and_prints_as_one_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print(sys.argv[1:], os.environ['X'], os.getcwd()); sys.exit('no')")
    done = python(script, "a b", env={"X": "1"})
    assert (done.returncode, done.stderr) == (1, "no\n")
    assert done.stdout == f"['a b'] 1 {Path(__file__).parents[2]}\n"
    assert python("-c", "import os; os.kill(os.getpid(), 9)").returncode == -9


@pytest.mark.parametrize("ending", ["", "time.sleep(300)"], ids=["ended", "running"])
def test_nothing_is_left_of_a_killed_command(tmp_path: Path, ending: str) -> None:
    note = tmp_path / "pid"
    with started_forked(["-c", LEAVES_A_CHILD.format(ending=ending), str(note)]) as process:
        deadline = time.monotonic() + 60
        while not note.exists() or not note.read_text() or (not ending and process.poll() is None):
            assert time.monotonic() < deadline, process.output()
            time.sleep(0.01)
    child = int(note.read_text())
    deadline = time.monotonic() + 10
    while _runs(child):
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False
