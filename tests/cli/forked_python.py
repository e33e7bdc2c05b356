"""A ``python`` that is forked, not started: for scripts and launchers that name one.

``forked_python()`` gives a folder laid out like a virtual environment. Its ``python``, ``torchrun`` and
``megatron-med`` hand arguments, folder, environment and standard streams to a server that has torch loaded; the
server forks, and the stub ends as the fork does. Signals are handed on; a fork whose stub was killed is killed. Exit
code and output are those of a process of its own; the process id is another, so that a test which stops a rank
(SIGSTOP) or looks for it by its command line wants the real one.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PROGRAMS: dict[str, list[str]] = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run"],
    "megatron-med": ["-m", "megatron_med.commands"],
}
_NO_OPTION = ("-m", "-c", "-")
_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT)

_STUB = """\
#!{python} -IS
import json, os, signal, socket, sys
arguments = {before!r} + sys.argv[1 + (sys.argv[1:2] == ["-u"]):]
if arguments[:2] == ["-m", "pip"] or not arguments or (arguments[0][:1] == "-" and arguments[0] not in {plain!r}):
    os.execv({python!r}, [{python!r}, *arguments])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
told = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(told).to_bytes(8, "little")], [0, 1, 2])
server.sendall(told)
for number in {handed_on!r}:
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, frame: server.send(bytes([number])))
answer = server.recv(8)
code = int.from_bytes(answer, "little", signed=True) if answer else 1
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def become(arguments: list[str], folder: str | Path, environment: dict[str, str]) -> None:
    """What the interpreter does with ``arguments``: a script, ``-m MODULE``, ``-c CODE`` or ``-`` (from stdin)."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] in ("-c", "-"):
        code = arguments[1] if arguments[0] == "-c" else sys.stdin.read()
        sys.argv = [arguments[0], *arguments[1 + (arguments[0] == "-c") :]]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def serve(address: str) -> None:
    """Forks whatever the stubs ask for, until it is ended."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is listener:
                _begin(listener, waiting)
            else:
                key.data()


def _begin(listener: socket.socket, waiting: selectors.BaseSelector) -> None:
    """Forks one, and watches it and its stub."""
    stub, _ = listener.accept()
    told, streams = _request(stub)
    pid = os.fork() if told else 0
    if told and pid == 0:
        _run(streams, *json.loads(told))
    for stream in streams:
        os.close(stream)
    if not told:  # the stub was killed
        stub.close()
        return
    ended = os.pidfd_open(pid)

    def hear() -> None:
        numbers = b""
        with suppress(ConnectionError):
            numbers = stub.recv(16)
        if numbers:
            for number in numbers:
                os.kill(pid, number)
        else:
            waiting.unregister(stub)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # it may not have made its group yet
                os.killpg(pid, signal.SIGKILL)

    def end() -> None:
        waiting.unregister(ended)
        os.close(ended)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with suppress(KeyError):
            waiting.unregister(stub)
        with suppress(OSError):
            stub.send(code.to_bytes(8, "little", signed=True))
        stub.close()

    waiting.register(stub, selectors.EVENT_READ, hear)
    waiting.register(ended, selectors.EVENT_READ, end)


def _request(stub: socket.socket) -> tuple[bytes, list[int]]:
    """What a stub asks for, and its standard streams; nothing where it ends before it has said it."""
    told, streams = b"", []
    with suppress(ConnectionError):
        length, streams, _, _ = socket.recv_fds(stub, 8, 3)
        while len(told) < int.from_bytes(length, "little"):
            piece = stub.recv(1 << 16)
            if not piece:
                return b"", streams
            told += piece
    return told, streams


def _run(streams: list[int], arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """The forked process, to its end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with the server
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 256)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  they stay open to the end
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")  # noqa: SIM115
    code = 1
    try:
        become(arguments, folder, environment)
        code = 0
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            code = (error.code or 0) & 0xFF
        else:
            print(error.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            code = 130
    for last in (_join_threads, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):
        with suppress(Exception):
            last()
    os._exit(code)


def _join_threads() -> None:
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


def with_python_of(venv: Path) -> dict[str, str]:
    """Variables that make scripts, and torchrun for its ranks, take the stubs."""
    path = f"{venv / 'bin'}:{os.environ['PATH']}"
    return {"MEGATRON_MED_VENV": str(venv), "PATH": path, "PYTHON_EXEC": str(venv / "bin" / "python")}


@contextmanager
def forked_python(env: dict[str, str] | None = None) -> Iterator[Path]:
    """The folder, with a server behind it that was started with ``env`` (default: that of the tests)."""
    with tempfile.TemporaryDirectory(prefix="forked-") as name:
        folder = Path(name)
        address = str(folder / "socket")
        (folder / "bin").mkdir()
        for file in Path(sys.prefix).glob(".megatron_med-*"):
            shutil.copy(file, folder)  # what setup_env.sh asks for: the environment is up to date
        for program, before in _PROGRAMS.items():
            stub = folder / "bin" / program
            handed_on = tuple(map(int, _HANDED_ON))
            fields = {"python": sys.executable, "before": before, "plain": _NO_OPTION, "handed_on": handed_on}
            stub.write_text(_STUB.format(**fields, address=address))
            stub.chmod(0o755)
        command = [sys.executable, "-m", "tests.cli.forked_python", address]
        server = subprocess.Popen(command, cwd=REPOSITORY, env=env, start_new_session=True)
        try:
            deadline = time.monotonic() + 120
            while not Path(address).exists():
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.02)
            yield folder
        finally:
            server.kill()
            server.wait(30)


if __name__ == "__main__":
    import tests.preload  # noqa: F401

    serve(sys.argv[1])
