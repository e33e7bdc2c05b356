"""Starts a command on several processes by torchrun's own ``run``, and ends with the exit code of the ranks.

torchrun itself answers 1 for whatever a rank has answered, behind some sixty lines of traceback. Here the record that
the ranks leave (``MEGATRON_MED_EXIT_FILE``) gives the code, and what a rank has printed stands last.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_med.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

EXIT_FILE = "MEGATRON_MED_EXIT_FILE"
"""Names the file in which rank 0 says how it has ended, for who has started it."""

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def is_rank() -> bool:
    """Whether a launcher has started this process as one of its ranks."""
    return "RANK" in os.environ


def launch(launcher: Sequence[str], command: Sequence[str]) -> int:
    """``torchrun LAUNCHER -m COMMAND``; a signal reaches the ranks, which have five minutes to save.

    Args:
        launcher: options of torchrun, such as ``--nproc-per-node 8``.
        command: a module and its arguments.

    Returns:
        The ranks' exit code.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported: its sockets warn at every start
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    logging.disable(logging.ERROR)  # the agent's, when ranks end; they speak for themselves
    waiting = ["--signals-to-handle", _SIGNALS, "--shutdown-timeout", "300"]
    parser = get_args_parser()
    parser.usage = "megatron-med COMMAND [torchrun's options] -- ...    (torchrun --help lists them)"
    arguments = parser.parse_args([*waiting, *launcher, "-m", *command])
    if arguments.training_script != command[0]:
        told = f"{arguments.training_script} stands before --, where only torchrun's options go. Put it behind --."
        print(f"error: {told}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if str(arguments.nproc_per_node).lstrip("-").isdecimal() and int(arguments.nproc_per_node) < 1:
        print(f"error: --nproc-per-node is {arguments.nproc_per_node}: at least 1 is needed.", file=sys.stderr)
        return EXIT_BAD_INPUT
    if "OMP_NUM_THREADS" not in os.environ and str(arguments.nproc_per_node).isdecimal():
        os.environ["OMP_NUM_THREADS"] = str(_threads(int(arguments.nproc_per_node)))
    with tempfile.TemporaryDirectory() as folder:
        record = Path(os.environ.setdefault(EXIT_FILE, str(Path(folder) / "exit.json")))
        try:
            run(arguments)
        except ChildFailedError as error:
            return _ended(record, *_cause(error))
        except SignalException as error:
            return _ended(record, 128 + error.sigval, f"ended by {signal.Signals(error.sigval).name}")
        except (ValueError, RuntimeError) as error:  # options of torchrun that do not go together, a rendezvous
            print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
            return EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_FAILED
    return EXIT_DONE


def _threads(ranks: int) -> int:
    """Of each rank: the cores shared out."""
    here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)  # macOS has none
    return max(1, len(here) // max(1, ranks))


def _ended(record: Path, code: int, cause: str = "") -> int:
    """The code that the ranks have recorded; else the given one, and the cause, where no rank could tell it."""
    try:
        return int(json.loads(record.read_text(encoding="utf-8"))["code"])
    except (OSError, ValueError, KeyError, TypeError):
        if cause:
            print(f"error: {cause}", file=sys.stderr)
        return code


def _cause(error: ChildFailedError) -> tuple[int, str]:
    """Exit code of the rank that failed first and, where a signal has ended it, the cause in words."""
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    if code >= 0:
        return code, ""
    name = signal.Signals(-code).name
    memory = ": the machine may have no memory left" if -code == signal.SIGKILL else ""
    return EXIT_FAILED, f"rank {rank} was ended by {name}{memory}"
