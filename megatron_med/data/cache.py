"""Content-addressed cache of index arrays: built once per node under a file lock, checked when read.

An entry is a folder named by the hash of what it was made from, written under a temporary name and renamed. Nothing
is ever written beside the data, and no shared file system is needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from megatron_med.files import replacing, sha256, write_json

Arrays = dict[str, npt.NDArray[Any]]

_log = logging.getLogger(__name__)


def cache_folder(configured: str | None) -> Path:
    """``configured``, else MEGATRON_MED_CACHE, else ~/.cache/megatron_med."""
    chosen = configured or os.environ.get("MEGATRON_MED_CACHE") or "~/.cache/megatron_med"
    return Path(chosen).expanduser()


def cached_arrays(folder: Path, ingredients: Mapping[str, Any], build: Callable[[], Arrays]) -> Arrays:
    """Arrays made from ``ingredients``, from the cache where it has them intact.

    Args:
        folder: the cache.
        ingredients: everything that the arrays depend on; plain JSON values.
        build: makes the arrays.

    Returns:
        Memory-mapped arrays; freshly built ones in memory where the cache cannot be written.
    """
    key = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:32]
    entry = folder / key
    arrays = _read(entry)  # without the lock: entries appear in one piece, and ranks need not queue to check them
    if arrays is not None:
        return arrays
    lock = FileLock(folder / f"{key}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        _warn(folder, error)
        return build()
    try:
        arrays = _read(entry)
        if arrays is not None:
            return arrays
        arrays = build()
        _write_if_possible(entry, arrays, ingredients)
    finally:
        lock.release()
    return _read(entry) or arrays


def _write_if_possible(entry: Path, arrays: Arrays, ingredients: Mapping[str, Any]) -> None:
    try:
        _write(entry, arrays, ingredients)
    except OSError as error:
        _warn(entry.parent, error)


def _warn(folder: Path, error: OSError) -> None:
    free = ""
    with suppress(OSError):
        free = f", {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free"
    _log.warning("The index cache %s cannot be written (%s%s); indices are kept in memory.", folder, error, free)


def _read(entry: Path) -> Arrays | None:
    """The arrays of an entry; None where it is absent or damaged.

    A file of the size and time of its writing is not hashed: starting costs the same for any size.
    """
    try:
        files = json.loads((entry / "manifest.json").read_text())["files"]
        for name, described in files.items():
            path = entry / f"{name}.npy"
            if _stamp(path) != described["stamp"] and sha256(path) != described["sha256"]:
                _log.warning("The index cache entry %s is damaged and is built again.", entry)
                return None
        return {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in files}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(entry: Path, arrays: Arrays, ingredients: Mapping[str, Any]) -> None:
    """Under the entry's lock: whatever half-written folder is there belongs to a builder that is no more."""
    for leftover in entry.parent.glob(f"{entry.name}.*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    with replacing(entry) as partial:
        partial.mkdir()
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        paths = {name: partial / f"{name}.npy" for name in arrays}
        files = {name: {"sha256": sha256(path), "stamp": _stamp(path)} for name, path in paths.items()}
        manifest = {"ingredients": dict(ingredients), "files": files}
        write_json(partial / "manifest.json", manifest)


def remembered(folder: Path, files: Sequence[Path], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` found out from files, kept in the cache as long as they have the same size and time."""
    stamps = {str(path.resolve()): _stamp(path) for path in files}
    key = hashlib.sha256(json.dumps(stamps, sort_keys=True).encode()).hexdigest()[:32]
    entry = folder / f"{key}.facts.json"
    try:
        facts: dict[str, Any] = json.loads(entry.read_text())["facts"]
        return facts
    except (OSError, ValueError, KeyError, TypeError):
        facts = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(entry, {"files": stamps, "facts": facts})
    except OSError as error:
        _warn(folder, error)
    return facts


def _stamp(path: Path) -> list[int]:
    """Size and time of the last change, in nanoseconds."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
