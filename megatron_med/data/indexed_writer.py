"""Writes token files document by document, in flat memory, and goes on where a killed run stopped.

Until all is written there are ``prefix.bin.partial``, ``prefix.sizes.partial`` (int32 lengths) and a journal,
``prefix.partial.json``, that says how much of both is safe and what the caller had read by then.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from megatron_med.data.indexed import DTYPES, HEADER, MAGIC, VERSION, IndexedDataset, token_paths
from megatron_med.errors import DataError, UserError
from megatron_med.files import naming, sync, write_json

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_CHUNK = 1 << 20


class IndexedDatasetWriter:
    """Writes ``prefix.bin`` and ``prefix.idx``. The files appear under their names only when all is written.

    Used as a context manager. A fault of the user's leaves nothing behind. Whatever else ends the writing leaves what
    the last ``save_position`` made safe, and a writer with equal ``ingredients`` goes on from there.

    Args:
        prefix: of the files.
        dtype: of the stored ids.
        ingredients: everything that the content depends on, as JSON; None never goes on from an earlier run.

    Attributes:
        position: what the caller gave to the last ``save_position`` of the run that is gone on from, or None.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike, ingredients: Any = None) -> None:
        self._bin_path, self._idx_path = token_paths(Path(prefix))
        self._dtype = np.dtype(dtype)
        self._ingredients = json.loads(json.dumps(ingredients))
        self._partial_bin = _beside(self._bin_path, ".bin.partial")
        self._partial_sizes = _beside(self._bin_path, ".sizes.partial")
        self._partial_idx = _beside(self._bin_path, ".idx.partial")
        self._journal = _beside(self._bin_path, ".partial.json")
        self.documents = 0
        self.tokens = 0
        self.position: Any = None
        try:
            self._bin_path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(_beside(self._bin_path, ".partial.lock"), timeout=0)
            self._lock.acquire()
            self._resume()
            self._bin, self._sizes = self._partial_bin.open("ab"), self._partial_sizes.open("ab")
        except Timeout as error:
            raise DataError(f"{self._bin_path} is being written by another process: wait, or name another.") from error
        except OSError as error:
            raise DataError(f"{self._bin_path} cannot be written: {error.strerror}. Choose another place.") from error

    def _resume(self) -> None:
        journal = _read_journal(self._journal)
        safe = (journal["documents"] * 4, journal["tokens"] * self._dtype.itemsize) if journal else (0, 0)
        known = journal is not None and self._ingredients is not None and journal["ingredients"] == self._ingredients
        files = (self._partial_sizes, self._partial_bin)
        if known and all(
            file.is_file() and file.stat().st_size >= size for file, size in zip(files, safe, strict=True)
        ):
            for file, size in zip(files, safe, strict=True):
                os.truncate(file, size)
            assert journal is not None, "it is known"
            self.documents, self.tokens = journal["documents"], journal["tokens"]
            self.position = journal["position"]
        else:
            self._remove()

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Appends one document of ids."""
        ids = np.asarray(tokens)
        if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(self._dtype).max):
            raise DataError(f"ids from {ids.min()} to {ids.max()} do not fit into {self._dtype.name}.")
        self.add_documents(ids.astype(self._dtype).tobytes(), np.array([ids.size], np.int32))

    def add_documents(self, tokens: bytes | npt.NDArray[np.uint8], sizes: npt.NDArray[np.int32]) -> None:
        """Appends documents whose ids are already bytes of the stored type.

        Args:
            tokens: the ids of all of them.
            sizes: tokens of each.
        """
        with naming(self._bin_path):
            self._bin.write(tokens if isinstance(tokens, bytes) else tokens.data)
            self._sizes.write(sizes.astype("<i4").tobytes())
        self.documents += len(sizes)
        self.tokens += int(sizes.sum(dtype=np.int64))

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Appends every document of another file of the same type."""
        for start in range(0, len(dataset), _CHUNK):
            sizes = dataset.sizes[start : start + _CHUNK]
            if len(sizes):
                self.add_documents(dataset.read_many(start, len(sizes)), np.asarray(sizes))

    def save_position(self, position: Any) -> None:
        """Makes what is written so far safe, together with what the caller needs to go on after it."""
        with naming(self._bin_path):
            sync(self._bin)
            sync(self._sizes)
        journal = {
            "ingredients": self._ingredients,
            "documents": self.documents,
            "tokens": self.tokens,
            "position": position,
        }
        write_json(self._journal, journal, indent=None)

    def restart(self) -> None:
        """Forgets what an earlier run had written."""
        self._bin.truncate(0)
        self._sizes.truncate(0)
        self._journal.unlink(missing_ok=True)
        self.documents = self.tokens = 0
        self.position = None

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with naming(self._bin_path):
                    self._commit()
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._close()
            is_worth_going_on_from = self._ingredients is not None and self._journal.is_file()
            if error is None or isinstance(error, UserError) or not is_worth_going_on_from:
                self._remove()
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)

    def _close(self) -> None:
        for file in (self._bin, self._sizes):
            with suppress(OSError):  # the rest does not fit on the disk, which was told before
                file.close()

    def _remove(self) -> None:
        for path in (self._partial_bin, self._partial_sizes, self._partial_idx, self._journal):
            path.unlink(missing_ok=True)

    def _commit(self) -> None:
        sync(self._bin)
        sync(self._sizes)
        with self._partial_idx.open("wb") as file:
            file.write(MAGIC)
            file.write(HEADER.pack(VERSION, _CODES[self._dtype.type], self.documents, self.documents + 1))
            with self._partial_sizes.open("rb") as sizes:
                shutil.copyfileobj(sizes, file, _CHUNK)
            for sizes_chunk, offset in self._chunks():
                ends = np.cumsum(sizes_chunk, dtype=np.int64) * self._dtype.itemsize
                file.write((offset + ends - sizes_chunk * np.int64(self._dtype.itemsize)).astype("<i8").tobytes())
            for start in range(0, self.documents + 1, _CHUNK):
                file.write(np.arange(start, min(start + _CHUNK, self.documents + 1), dtype="<i8").tobytes())
            sync(file)
        os.replace(self._partial_bin, self._bin_path)
        os.replace(self._partial_idx, self._idx_path)

    def _chunks(self) -> Iterator[tuple[npt.NDArray[np.int32], int]]:
        """Lengths, some at a time, with the byte offset at which they begin."""
        offset = 0
        with self._partial_sizes.open("rb") as file:
            while len(chunk := np.frombuffer(file.read(4 * _CHUNK), "<i4")):
                yield chunk, offset
                offset += int(chunk.sum(dtype=np.int64)) * self._dtype.itemsize


class ColumnsWriter:
    """Writes files side by side whose documents have equal lengths, such as tokens and their roles.

    Args:
        columns: prefix and type of each file; the first one holds the tokens.
        ingredients: everything that the content depends on.
    """

    def __init__(self, columns: Sequence[tuple[Path, npt.DTypeLike]], ingredients: Any) -> None:
        self._stack = ExitStack()
        with ExitStack() as opening:
            self._writers = [
                opening.enter_context(IndexedDatasetWriter(prefix, dtype, ingredients)) for prefix, dtype in columns
            ]
            self._stack = opening.pop_all()
        if any(writer.position != self._writers[0].position for writer in self._writers):
            for writer in self._writers:
                writer.restart()

    @property
    def documents(self) -> int:
        """Documents so far."""
        return self._writers[0].documents

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._writers[0].tokens

    @property
    def position(self) -> Any:
        """What the caller gave to the last ``save_position`` of the run that is gone on from, or None."""
        return self._writers[0].position

    def add_documents(self, columns: Sequence[bytes], sizes: npt.NDArray[np.int32]) -> None:
        """Appends documents, to every file."""
        for writer, tokens in zip(self._writers, columns, strict=True):
            writer.add_documents(tokens, sizes)

    def save_position(self, position: Any) -> None:
        """As ``IndexedDatasetWriter.save_position``, of every file."""
        for writer in self._writers:
            writer.save_position(position)

    def __enter__(self) -> ColumnsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def _beside(bin_path: Path, ending: str) -> Path:
    return bin_path.with_name(bin_path.name.removesuffix(".bin") + ending)


def _read_journal(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
