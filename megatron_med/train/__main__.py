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
from megatron_med.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, CheckpointError, DataError, UserError
from megatron_med.train.run_folder import RunFolder

if TYPE_CHECKING:
    from megatron_med.parallel.roll_call import RollCall
    from megatron_med.train.signals import StopRequest

_PATIENCE = timedelta(seconds=15)


def main(arguments: list[str]) -> int:
    """Runs one rank and returns its exit code."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.WARNING if rank == 0 else logging.ERROR, format="%(message)s")
    if rank != 0 and any(argument.startswith(INFORMATION_FLAGS) for argument in arguments):
        return EXIT_DONE  # rank 0 prints it
    try:
        config = load_config(arguments, int(os.environ.get("WORLD_SIZE", "1")))
    except UserError as error:
        return _refuse(error, rank, peek_output_dir(arguments))
    return _train(config, rank)


def _train(config: Config, rank: int) -> int:
    import torch.distributed as dist  # after the configuration was accepted: refusing takes no torch

    from megatron_med.parallel.collectives import gather_objects
    from megatron_med.parallel.context import start_process_group
    from megatron_med.train.loop import train
    from megatron_med.train.setup import set_up
    from megatron_med.train.signals import StopRequest

    folder = RunFolder(config.train.output_dir)
    training = False
    stop = StopRequest()
    roll_call: RollCall | None = None
    try:
        device, roll_call = start_process_group(timedelta(minutes=config.train.timeout_minutes))
        run = set_up(config, folder, device)
        training = True
        stop.listen()
        code, reason = train(run, stop)
        if rank == 0:
            print(reason, flush=True)
            folder.write_exit(code, reason)
        gather_objects(code, run.context.world)  # no rank leaves before the record is written
        return code
    except UserError as error:
        if training and rank != 0 and isinstance(error, DataError):  # a sample that this rank alone has read
            print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
        code = _refuse(error, rank, config.train.output_dir, folder)
        if training:
            _leave(code)
        return code
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = CheckpointError(f"The disk is full: {error}. Make room and start the same command again.")
            _leave(_refuse(full, rank, config.train.output_dir, folder))
        _fail(error, rank, folder, _silence(roll_call, config, stop))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        folder.release()


def _silence(roll_call: RollCall | None, config: Config, stop: StopRequest) -> str:
    """Names the ranks that do not answer any more; empty where all do, or where another rank tells it."""
    if roll_call is None:
        return ""
    timeout = timedelta(minutes=config.train.timeout_minutes)
    silent = roll_call.silent_ranks(min(timeout, _PATIENCE), is_hurried=lambda: stop.asked)
    if not silent or not roll_call.speaks(silent):
        return ""
    plural, verb = ("s", "hang or have") if len(silent) > 1 else ("", "hangs or has")
    numbers = ", ".join(map(str, silent))
    return f"rank{plural} {numbers} did not answer (train.timeout_minutes is {timeout}): {verb} died."


def _fail(error: BaseException, rank: int, folder: RunFolder, silence: str) -> NoReturn:
    traceback.print_exception(error)
    if silence:
        print(f"error: {silence}", file=sys.stderr)
    if rank == 0 and folder.claimed:
        folder.write_exit(EXIT_FAILED, " ".join(filter(None, [silence, f"{type(error).__name__}: {error}"])))
    _leave(EXIT_FAILED)


def _leave(code: int) -> NoReturn:
    """Ends this process at once: threads and connections of a broken run may never come to an end of their own."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _refuse(error: UserError, rank: int, output_dir: str | None, folder: RunFolder | None = None) -> int:
    """Rank 0 prints one message a fault and records the exit, unless another run is alive in the folder.

    The others wait for it: torchrun ends all ranks when the first one is gone, and rank 0 must have spoken by then.
    """
    if rank == 0:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr, flush=True)
        folder = folder or (RunFolder(output_dir) if output_dir else None)
        if folder is not None:
            _record(folder, str(error))
    else:
        time.sleep(_PATIENCE.total_seconds())
    return EXIT_BAD_INPUT


def _record(folder: RunFolder, reason: str) -> None:
    try:
        folder.claim()
    except UserError:
        return
    folder.write_exit(EXIT_BAD_INPUT, reason)
    folder.release()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
