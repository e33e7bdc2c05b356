"""Every error that a user can cause. Each message names the value, the rule it breaks and the remedy."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the locale has no character for is told all the same
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end_by_signal)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_DONE)
    except OSError as error:
        print(f"error: {describe_os_error(error)}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except UserError as error:
        for fault in error.faults if os.environ.get("RANK", "0") == "0" else ():
            print(f"error: {fault}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    sys.exit(EXIT_DONE)


def _end_by_signal(number: int, _: object) -> NoReturn:
    """Ends in order: what was begun is taken away, and child processes end, too."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


_REMEDIES = {
    errno.ENOSPC: "Make room and start the same command again",
    errno.EDQUOT: "Make room in your quota and start the same command again",
    errno.EACCES: "Change its permissions, or name another",
    errno.EPERM: "Change its permissions, or name another",
    errno.EROFS: "Name a place that can be written",
    errno.ENAMETOOLONG: "Name a shorter one",
}


def describe_os_error(error: OSError) -> str:
    """What the system refused, of which file, and what to do, in a line."""
    where = f"{error.filename}: " if error.filename is not None else ""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{where}{reason}. {_REMEDIES.get(error.errno or 0, 'Check the path')}."
