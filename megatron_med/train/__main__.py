"""``torchrun --nproc-per-node N -m megatron_med.train CONFIG.yaml [--section.key value ...]``"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import traceback
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from megatron_med.config import Config, load_config
from megatron_med.config.load import INFORMATION_FLAGS, peek_output_dir
from megatron_med.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, UserError, describe_os_error
from megatron_med.kernels.backend import describe
from megatron_med.launch.collection import uncollected
from megatron_med.launch.environment import read_ranks
from megatron_med.train.run_folder import RunFolder, write_launch_record
from megatron_med.train.signals import StopRequest

if TYPE_CHECKING:
    from megatron_med.launch.failure_report import FailureReport

_PATIENCE = timedelta(seconds=15)
_RANK_0_PATIENCE = timedelta(seconds=5)


def main(arguments: list[str]) -> int:
    """Runs one rank and returns its exit code."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported: its sockets warn at every start
    try:
        rank, world_size = read_ranks()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        write_launch_record(EXIT_BAD_INPUT, str(error))
        return EXIT_BAD_INPUT
    logging.basicConfig(level=logging.WARNING if rank == 0 else logging.ERROR, format="%(message)s")
    if "--dry-run" in arguments:
        return _dry_run(arguments)
    stop = StopRequest()
    stop.listen()
    if rank != 0 and any(argument.startswith(INFORMATION_FLAGS) for argument in arguments):
        return EXIT_DONE  # rank 0 prints it
    try:
        config = load_config(arguments, world_size)
    except UserError as error:
        return _refuse(error, rank, peek_output_dir(arguments), stop)
    except SystemExit:
        if "--print_config" in arguments:
            print(f"# {describe()}")
        raise
    return _train(config, rank, stop)


def _dry_run(arguments: list[str]) -> int:
    with uncollected():
        from megatron_med.train.dry_run import main as dry_run

    return dry_run(arguments)


def _train(config: Config, rank: int, stop: StopRequest) -> int:
    with uncollected():
        import torch.distributed as dist  # after the configuration was accepted: refusing takes no torch

        from megatron_med.launch.process_group import start_process_group
        from megatron_med.parallel.collectives import gather_objects
        from megatron_med.train.loop import train
        from megatron_med.train.setup import set_up

    folder = RunFolder(config.train.output_dir)
    report: FailureReport | None = None
    try:
        device, report = start_process_group(timedelta(minutes=config.train.timeout_minutes), lambda: stop.asked)
        run = set_up(config, folder, device)
        outcome = train(run, stop)
        if rank == 0:
            print(outcome.reason, flush=True)
            folder.write_exit(outcome.code, outcome.reason, outcome.retry)
        else:
            write_launch_record(outcome.code, outcome.reason, outcome.retry)  # for the launch script of another host
        gather_objects(outcome.code, run.context.world)  # no rank leaves before the record is written
    except BaseException as error:
        _end(error, rank, folder, report, config, stop)
    dist.destroy_process_group()
    folder.release()
    return outcome.code


def _end(
    error: BaseException,
    rank: int,
    folder: RunFolder,
    report: FailureReport | None,
    config: Config,
    stop: StopRequest,
) -> NoReturn:
    """Says why the run ends, records it, and leaves at once: threads and connections of a broken run may never end.

    A fault of this rank alone is told to the others, who find it where their collectives fail.
    """
    from megatron_med.launch.failure_report import is_connection_failure
    from megatron_med.launch.rendezvous import StoppedError

    if isinstance(error, StoppedError) or (report is None and stop.asked):
        _leave_unstarted(rank, folder, stop)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        error = UserError(describe_os_error(error))  # not a broken connection
    if isinstance(error, UserError):
        _end_by_user_fault(error, rank, folder, report, stop)
    code, reason = EXIT_FAILED, f"{type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt):
        reason = "ended without a save by a second Ctrl-C"
        print(f"error: {reason}", file=sys.stderr)
    elif report is not None and is_connection_failure(error):
        code, why = _why(report, config, stop, reason)
        if why == reason:  # nobody knows the cause
            traceback.print_exception(error)
        reason = why
    else:
        traceback.print_exception(error)
        if report is not None:
            report.record(code, f"rank {rank}: {reason}")
    if rank == 0 and folder.claimed:
        folder.write_exit(code, reason)
    elif code == EXIT_BAD_INPUT:
        write_launch_record(code, reason)
    _leave(code)


def _leave_unstarted(rank: int, folder: RunFolder, stop: StopRequest) -> NoReturn:
    """The end was asked for before all ranks had come: there is nothing to save.

    torchrun sends SIGTERM to the others, too, when a rank has died, which is no wish to stop: a launch script may start
    again, unless it was signalled itself.
    """
    from megatron_med.train.loop import stopped

    outcome = stopped("stopped before all ranks had come", stop.reason or "rank 0 was asked to")
    retry = outcome.retry or (True if stop.signal_name == "SIGTERM" else None)
    if rank == 0:
        print(outcome.reason, flush=True)
        _record(folder, outcome.code, outcome.reason, retry)
    _leave(outcome.code)


def _end_by_user_fault(
    error: UserError, rank: int, folder: RunFolder, report: FailureReport | None, stop: StopRequest
) -> NoReturn:
    """Most such faults are found by all ranks together: rank 0 alone prints them. One that a single rank has found (a
    sample, a disk that is not mounted there) it prints itself, when rank 0 has not spoken for a while."""
    if report is not None:
        report.record(EXIT_BAD_INPUT, "\n".join(f"rank {rank}: {fault}" if rank else fault for fault in error.faults))
    if rank == 0:
        _refuse(error, rank, None, stop, folder)
        if report is not None:
            report.mark_recorded()
    else:
        write_launch_record(EXIT_BAD_INPUT, str(error))  # for the launch script of another host
        if report is None or not report.await_record(_RANK_0_PATIENCE):
            for fault in error.faults:
                print(f"error: rank {rank}: {fault}", file=sys.stderr)
    _leave(EXIT_BAD_INPUT)


def _why(report: FailureReport, config: Config, stop: StopRequest, reason: str) -> tuple[int, str]:
    """Exit code and reason of a collective that failed: another rank's own fault, or the ranks that are silent."""
    timeout = timedelta(minutes=config.train.timeout_minutes)
    silent = report.silent_ranks(min(timeout, _PATIENCE), is_hurried=lambda: stop.asked)
    cause = report.cause()
    if cause is not None:
        return cause.code, cause.reason
    if not silent:
        return EXIT_FAILED, reason
    plural, verb = ("s", "hang or have") if len(silent) > 1 else ("", "hangs or has")
    numbers = ", ".join(map(str, silent))
    silence = f"rank{plural} {numbers} did not answer (train.timeout_minutes is {timeout}): {verb} died."
    if report.is_reporter(silent):
        print(f"error: {silence}", file=sys.stderr)
    return EXIT_FAILED, f"{silence} {reason}"


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _refuse(
    error: UserError, rank: int, output_dir: str | None, stop: StopRequest, folder: RunFolder | None = None
) -> int:
    """Rank 0 prints one message a fault and records the exit, unless another run is alive in the folder.

    The others wait for it: torchrun ends all ranks when the first one is gone, and rank 0 must have spoken by then.
    """
    if rank == 0:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr, flush=True)
        folder = folder or (RunFolder(output_dir) if output_dir else None)
        _record(folder, EXIT_BAD_INPUT, str(error))
    else:
        write_launch_record(EXIT_BAD_INPUT, str(error))  # for the launch script of another host
        deadline = time.monotonic() + _PATIENCE.total_seconds()
        while not stop.asked and time.monotonic() < deadline:
            time.sleep(0.1)
    return EXIT_BAD_INPUT


def _record(folder: RunFolder | None, code: int, reason: str, retry: bool | None = None) -> None:
    """Records the exit for the launch script, and in the folder where no other run is alive in it."""
    write_launch_record(code, reason, retry)
    try:
        if folder is None:
            return
        folder.claim()
    except UserError:
        return
    folder.write_exit(code, reason, retry)
    folder.release()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
