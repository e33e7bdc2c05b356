"""Files that appear in one piece, checksums and JSON: once, for every package. No torch here."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

PARTIAL = ".partial"
"""Ending of what is not whole yet."""
RUN_IDENTITY = "run.json"
"""Stands in the folder of a run from its first start on."""

PIECE = 2**20
_AT_ONCE = 4
_ABANDONED_SECONDS = 600.0


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the name of a file or folder to be written; at the end it takes the place of ``path``.

    Where the writing fails nothing is left of it, and ``path`` stays what it was; an error of the system that names no
    file (a full disk) names ``path``.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    _remove(partial)
    try:
        yield partial
        if partial.is_file():
            sync_path(partial)
        _put_in_place(partial, path)
    except OSError as error:
        if error.errno is not None:
            named = error.filename2 or error.filename or partial  # of a copy: where it was to go
            error.filename, error.filename2 = str(named).replace(str(partial), str(path)), None
        raise
    finally:
        _remove(partial)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets errors of the system that name no file, such as a full disk, name ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _put_in_place(partial: Path, path: Path) -> None:
    """A folder that stands there steps aside first: no system call replaces a folder that holds something."""
    if path.is_symlink() or not path.is_dir():
        os.replace(partial, path)
        return
    aside = path.with_name(f"{path.name}.{os.getpid()}.aside{PARTIAL}")
    os.replace(path, aside)
    try:
        os.replace(partial, path)
    except BaseException:
        os.replace(aside, path)
        raise
    _remove(aside)


def write_text(path: Path, text: str) -> None:
    """Writes a small file in one piece, and waits until the disk has it."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int | None = 2, ensure_ascii: bool = True) -> None:
    """Writes JSON in one piece."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=ensure_ascii) + "\n")


def whole_lines(path: Path) -> list[str]:
    """Lines of a file that is written line by line; a last one that a kill has cut is taken away."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with replacing(path) as partial:
            partial.write_bytes(content[:end])
    return content[:end].decode("utf-8").split("\n")[:-1]


class _Pieces(io.FileIO):
    """A file that takes at most PIECE bytes in one call, and remembers why it could not take some."""

    fault: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(memoryview(data)[:PIECE])
        except OSError as error:
            self.fault = error
            raise


@contextmanager
def open_large(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file for many bytes. One call for a whole tensor makes the kernel look for huge pages for its cache,
    which takes longer than the writing.

    Raises:
        OSError: names ``path``; also where a library that wrote into it has made an error of its own of it.
    """
    raw = _Pieces(path, "wb")
    try:
        with naming(path), io.BufferedWriter(raw, PIECE) as stream:
            yield stream
    except Exception as error:
        if raw.fault is None or raw.fault is error:
            raise
        raw.fault.filename = str(path)
        raise raw.fault from error


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_all(paths: Sequence[Path], sync: bool = False) -> list[str]:
    """Checksums of several files, some at a time; ``sync`` waits until the disk has them, while others are hashed."""

    def checked(path: Path) -> str:
        if sync:
            sync_path(path)
        return sha256(path)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(checked, paths))


def sync_path(path: Path) -> None:
    """Waits until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(file: IO[bytes]) -> None:
    """Waits until the disk has all that was written to an open file."""
    file.flush()
    os.fsync(file.fileno())


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Removes what killed processes were about to put in place in a folder that nobody else writes into.

    ``name`` is the file that is written; without it all files are.
    """
    for partial in folder.glob(f"{glob.escape(name) or '*'}.[0-9]*{PARTIAL}"):
        _remove(partial)


def remove_abandoned(path: Path) -> None:
    """Removes what dead processes of this host have left of a file or folder ``path``. One that was touched a while
    ago at the latest may belong to another host."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.[0-9]*{PARTIAL}"):
        pid = partial.name.removeprefix(f"{path.name}.").partition(".")[0]
        with suppress(OSError):
            touched = max(entry.stat().st_mtime for entry in (partial, *partial.rglob("*")))
            if pid.isdigit() and not _is_alive(int(pid)) and time.time() - touched > _ABANDONED_SECONDS:
                _remove(partial)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
