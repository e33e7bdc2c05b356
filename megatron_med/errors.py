"""Every error that a user can cause. Each message names the value, the rule it breaks and the remedy."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """One or more faults that the user can mend.

    Args:
        faults: one message a fault. A command prints each on a line of its own and ends with code 2.
    """

    def __init__(self, faults: str | Iterable[str]) -> None:
        self.faults: list[str] = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class ConfigError(UserError):
    """A configuration that cannot be run."""


class DataError(UserError):
    """Text, token files or a tokenizer that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint or Hugging Face folder that is missing, damaged or of another model."""


class TargetExistsError(UserError):
    """An output folder or file that would be overwritten."""


EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_SAVED_AFTER_SIGNAL = 75
"""EX_TEMPFAIL of sysexits.h: the state is saved, start the same command again."""


def run_command(main: Callable[[], None]) -> NoReturn:
    """Runs a command-line tool: a user's fault is one line each on standard error and exit code 2, no traceback."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_DONE)
    except UserError as error:
        for fault in error.faults if os.environ.get("RANK", "0") == "0" else ():
            print(f"error: {fault}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    sys.exit(EXIT_DONE)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises TargetExistsError where ``path`` is a file, or a folder with something in it."""
    if overwrite or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    raise TargetExistsError(f"{path} exists and is not empty: name another target, or pass --overwrite.")
