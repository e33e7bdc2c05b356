"""Token files in Megatron's own format: ``prefix.bin`` holds the ids, ``prefix.idx`` says where documents lie.

Layout of the index: magic ``MMIDIDX\\0\\0``, u64 version 1, u8 dtype code, u64 sequences, u64 document borders, then
int32 lengths, int64 byte offsets, int64 document borders. No torch here.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_med.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
UINT16_LIMIT = 65500
"""Vocabularies below this are stored in 16 bits, as Megatron does."""

_HEADER = struct.Struct("<QBQQ")
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

Tokens = npt.NDArray[Any]


def smallest_dtype(vocab_size: int) -> type[np.generic]:
    """uint16 where the vocabulary fits, else int32."""
    return np.uint16 if vocab_size < UINT16_LIMIT else np.int32


class IndexedDataset:
    """Read-only view of a token file; nothing is copied until a document is read.

    Attributes:
        sizes: int32 length of each document, in tokens.
        document_borders: int64, where each document begins in the list of sequences.
        dtype: of the stored ids.

    Raises:
        DataError: files are missing, damaged or of another format.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.bin_path, self.idx_path = token_paths(self.prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise DataError(f"There is no {path}. data paths are prefixes: PREFIX.bin and PREFIX.idx must exist.")
        code, sequences, borders = self._read_header()
        self.dtype = np.dtype(_DTYPES[code])
        start = len(MAGIC) + _HEADER.size
        expected = start + sequences * 12 + borders * 8
        actual = self.idx_path.stat().st_size
        if actual != expected:
            raise DataError(f"{self.idx_path} has {actual} bytes, its header asks for {expected}: write it again.")
        raw = np.memmap(self.idx_path, mode="r", dtype=np.uint8)
        self.sizes: npt.NDArray[np.int32] = raw[start : start + 4 * sequences].view(np.int32)
        start += 4 * sequences
        self._offsets = raw[start : start + 8 * sequences].view(np.int64)
        self.document_borders: npt.NDArray[np.int64] = raw[start + 8 * sequences :].view(np.int64)
        self._check_bin()
        self._tokens = np.memmap(self.bin_path, mode="r", dtype=self.dtype) if self.token_count else None

    def _read_header(self) -> tuple[int, int, int]:
        with self.idx_path.open("rb") as file:
            magic = file.read(len(MAGIC))
            header = file.read(_HEADER.size)
        if magic != MAGIC:
            raise DataError(
                f"{self.idx_path} begins with {magic!r}, not {MAGIC!r}: it is no Megatron index. "
                "Make one with tools/preprocess_data.py."
            )
        if len(header) < _HEADER.size:
            raise DataError(f"{self.idx_path} ends inside its header: write it again.")
        version, code, sequences, borders = _HEADER.unpack(header)
        if version != VERSION:
            raise DataError(f"{self.idx_path} is of version {version}: only version {VERSION} can be read.")
        if code not in _DTYPES or not np.issubdtype(_DTYPES[code], np.integer):
            raise DataError(f"{self.idx_path} has dtype code {code}: token ids need an integer type (1-5, 8).")
        return code, sequences, borders

    def _check_bin(self) -> None:
        actual = self.bin_path.stat().st_size
        end = int((self._offsets + self.sizes.astype(np.int64) * self.dtype.itemsize).max()) if len(self) else 0
        if actual < end:
            raise DataError(
                f"{self.bin_path} has {actual} bytes, its index needs {end}: the file is truncated. Write it again."
            )

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def token_count(self) -> int:
        """Tokens of all documents."""
        return int(self.sizes.sum(dtype=np.int64))

    def read(self, index: int, offset: int = 0, length: int | None = None) -> Tokens:
        """Tokens of document ``index`` from ``offset`` on; all of them, or ``length``. A view of the file."""
        size = int(self.sizes[index])
        if length is None:
            length = size - offset
        if not 0 <= offset <= offset + length <= size:
            raise IndexError(f"document {index} has {size} tokens; {offset} to {offset + length} were asked for")
        if self._tokens is None:
            return np.empty(0, self.dtype)
        start = int(self._offsets[index]) // self.dtype.itemsize + offset
        return self._tokens[start : start + length]

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises DataError where the stored type cannot hold every id of the vocabulary."""
        if vocab_size - 1 > np.iinfo(self.dtype).max:
            raise DataError(
                f"{self.idx_path} stores {self.dtype.name}, which does not hold a vocabulary of {vocab_size}: "
                "tokenize again with the tokenizer of this model."
            )


class IndexedDatasetWriter:
    """Writes ``prefix.bin`` and ``prefix.idx``. The files appear under their names only when all is written.

    Used as a context manager; an exception leaves nothing behind.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        self._bin_path, self._idx_path = token_paths(Path(prefix))
        self._dtype = np.dtype(dtype)
        self._sizes: list[int] = []
        self._borders = [0]
        self._partial_bin = _partial(self._bin_path)
        self._partial_idx = _partial(self._idx_path)
        try:
            self._bin_path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial_bin.open("wb")
        except OSError as error:
            raise DataError(f"{self._bin_path} cannot be written: {error.strerror}. Choose another place.") from error

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Appends one document of ids."""
        ids = np.asarray(tokens)
        if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(self._dtype).max):
            raise DataError(f"ids from {ids.min()} to {ids.max()} do not fit into {self._dtype.name}.")
        self._file.write(ids.astype(self._dtype).tobytes())
        self._sizes.append(ids.size)
        self._borders.append(len(self._sizes))

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Appends every document of another file."""
        for index in range(len(dataset)):
            self.add_document(dataset.read(index))

    @property
    def documents(self) -> int:
        return len(self._sizes)

    @property
    def tokens(self) -> int:
        return sum(self._sizes)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._commit()
        else:
            self._file.close()
            self._partial_bin.unlink(missing_ok=True)
            self._partial_idx.unlink(missing_ok=True)

    def _commit(self) -> None:
        _sync_and_close(self._file)
        sizes = np.array(self._sizes, dtype=np.int32)
        ends = np.cumsum(sizes.astype(np.int64) * self._dtype.itemsize)
        offsets = np.concatenate((np.zeros(1, np.int64), ends[:-1])) if len(ends) else ends
        with self._partial_idx.open("wb") as file:
            file.write(MAGIC)
            file.write(_HEADER.pack(VERSION, _CODES[self._dtype.type], len(sizes), len(self._borders)))
            file.write(sizes.tobytes())
            file.write(offsets.tobytes())
            file.write(np.array(self._borders, dtype=np.int64).tobytes())
            _sync_and_close(file)
        os.replace(self._partial_bin, self._bin_path)
        os.replace(self._partial_idx, self._idx_path)


def token_paths(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def _sync_and_close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
