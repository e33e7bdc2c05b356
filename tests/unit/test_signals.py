"""The tests pass in the background of a script, too, where SIGINT is ignored."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import REPOSITORY

STARTS_A_SHELL = """
import subprocess
from tests.signals import let_children_be_interrupted

{before}
subprocess.run(["bash", "-c", "trap 'echo trapped' INT; kill -INT $$"], timeout=20)
"""


def _in_the_background(code: str) -> str:
    script = ["bash", "-c", 'trap "" INT; exec "$@"', "script", sys.executable, "-c", code]
    return subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True).stdout


def test_what_the_tests_start_can_be_interrupted() -> None:
    assert _in_the_background(STARTS_A_SHELL.format(before="")) == "", "a shell can trap what it inherits as ignored"
    assert _in_the_background(STARTS_A_SHELL.format(before="let_children_be_interrupted()")) == "trapped\n"
    import_alone = "import signal, tests.conftest; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    assert _in_the_background(import_alone) == "False\n", "tests/conftest.py does not call it"
