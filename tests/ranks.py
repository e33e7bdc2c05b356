"""Runs a function on several gloo ranks, forked from a clean server that has torch loaded already."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT = 240.0

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["tests.preload"])


def start_server() -> None:
    """Starts the server that test processes are forked from. A process has one, for whoever asks first: code under test
    that asks for workers would have it start without torch, and every rank would import it."""
    multiprocessing.forkserver.ensure_running()


def free_port() -> int:
    """A port nobody listens on. It lies below those that the system hands out (32,768), and each worker of the tests
    has a range of its own: nobody else takes it before it is used."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for offset in _OFFSETS:
        port = 12_000 + worker % 10 * 2_000 + offset % 2_000
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("the offsets never end")


_OFFSETS = itertools.count(os.getpid())


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
    """``function(*arguments)`` on every rank of a process group; what each rank returned.

    The first rank that fails is raised here with its traceback. No process is left behind.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = forkserver.Pipe(duplex=False)
        process = forkserver.Process(target=_rank, args=(theirs, rank, world_size, port, function, arguments))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, timeout)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(set(range(len(pipes))) - set(results))} did not end in {timeout:.0f} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                failure, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if failure is not None:
                raise RuntimeError(f"rank {rank} failed:\n{failure}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT))
        _send(pipe, None, function(*arguments))
    except BaseException:
        _send(pipe, traceback.format_exc(), None)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.close()


def _send(pipe: Connection, failure: str | None, value: Any) -> None:
    """By value: what a connection makes of a tensor is a reference to memory that goes with the rank."""
    pipe.send_bytes(pickle.dumps((failure, value)))
