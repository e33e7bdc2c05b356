"""``torchrun --nproc-per-node N -m megatron_med.train CONFIG.yaml [--section.key value ...]``"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from datetime import timedelta

from megatron_med.config import Config, load_config
from megatron_med.config.load import INFORMATION_FLAGS, peek_output_dir
from megatron_med.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, CheckpointError, DataError, UserError
from megatron_med.train.run_folder import RunFolder

_PATIENCE_SECONDS = 15.0


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
    try:
        device = start_process_group(timedelta(minutes=config.train.timeout_minutes))
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
        return _refuse(error, rank, config.train.output_dir, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _record_failure(error, rank, folder)
            raise
        full = CheckpointError(f"The disk is full: {error}. Make room and start the same command again.")
        return _refuse(full, rank, config.train.output_dir, folder)
    except BaseException as error:
        _record_failure(error, rank, folder)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        folder.release()


def _record_failure(error: BaseException, rank: int, folder: RunFolder) -> None:
    if rank == 0 and folder.claimed:
        folder.write_exit(EXIT_FAILED, f"{type(error).__name__}: {error}")


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
        time.sleep(_PATIENCE_SECONDS)
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
