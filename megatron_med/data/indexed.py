"""Token files in Megatron's own format: ``prefix.bin`` holds the ids, ``prefix.idx`` says where documents lie.

Layout of the index: magic ``MMIDIDX\\0\\0``, u64 version 1, u8 dtype code, u64 sequences, u64 document borders, then
int32 lengths, int64 byte offsets, int64 document borders. No torch here.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_med.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
UINT16_LIMIT = 65500
"""Vocabularies below this are stored in 16 bits, as Megatron does."""

HEADER = struct.Struct("<QBQQ")
"""Version, dtype code, sequences, document borders."""

DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
"""dtype codes of the format."""

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
                raise DataError(f"There is no {path}. Data paths are prefixes: PREFIX.bin and PREFIX.idx must exist.")
        code, sequences, borders = self._read_header()
        self.dtype = np.dtype(DTYPES[code])
        start = len(MAGIC) + HEADER.size
        expected = start + sequences * 12 + borders * 8
        actual = self.idx_path.stat().st_size
        if actual != expected:
            raise DataError(f"{self.idx_path} has {actual} bytes, its header asks for {expected}: write it again.")
        raw = np.memmap(self.idx_path, mode="r", dtype=np.uint8)
        self.sizes: npt.NDArray[np.int32] = raw[start : start + 4 * sequences].view(np.int32)
        start += 4 * sequences
        self._offsets = raw[start : start + 8 * sequences].view(np.int64)
        self.document_borders: npt.NDArray[np.int64] = raw[start + 8 * sequences :].view(np.int64)
        if sequences and int(self.sizes.min()) < 0:
            raise DataError(f"{self.idx_path} holds a document of {int(self.sizes.min())} tokens: write it again.")
        self._check_bin()
        self._tokens = np.memmap(self.bin_path, mode="r", dtype=self.dtype) if self.bin_path.stat().st_size else None

    def _read_header(self) -> tuple[int, int, int]:
        with self.idx_path.open("rb") as file:
            magic = file.read(len(MAGIC))
            header = file.read(HEADER.size)
        if magic != MAGIC:
            raise DataError(
                f"{self.idx_path} begins with {magic!r}, not {MAGIC!r}: it is no Megatron index. "
                "Make one with megatron-med preprocess."
            )
        if len(header) < HEADER.size:
            raise DataError(f"{self.idx_path} ends inside its header: write it again.")
        version, code, sequences, borders = HEADER.unpack(header)
        if version != VERSION:
            raise DataError(f"{self.idx_path} is of version {version}: only version {VERSION} can be read.")
        if code not in DTYPES or not np.issubdtype(DTYPES[code], np.integer):
            raise DataError(f"{self.idx_path} has dtype code {code}: token ids need an integer type (1-5, 8).")
        return code, sequences, borders

    def _check_bin(self) -> None:
        actual = self.bin_path.stat().st_size
        end = int(self._offsets[-1]) + int(self.sizes[-1]) * self.dtype.itemsize if len(self) else 0
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
        tokens = self._tokens[start : start + length]
        if len(tokens) < length:
            raise DataError(f"{self.bin_path} ends inside document {index}: the file is truncated. Write it again.")
        return tokens

    def read_many(self, first: int, count: int) -> npt.NDArray[np.uint8]:
        """The bytes of ``count`` documents from ``first`` on, in order."""
        offsets, sizes = self._offsets[first : first + count], self.sizes[first : first + count]
        lengths = sizes.astype(np.int64) * self.dtype.itemsize
        if self._tokens is None:
            return np.empty(0, np.uint8)
        raw = self._tokens.view(np.uint8)
        if np.array_equal(offsets[1:], offsets[:-1] + lengths[:-1]):
            return raw[int(offsets[0]) : int(offsets[-1] + lengths[-1])]
        pieces = [raw[start : start + length] for start, length in zip(offsets.tolist(), lengths.tolist(), strict=True)]
        return np.concatenate(pieces)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises DataError where the stored type cannot hold every id of the vocabulary."""
        if vocab_size - 1 > np.iinfo(self.dtype).max:
            raise DataError(
                f"{self.idx_path} stores {self.dtype.name}, which does not hold a vocabulary of {vocab_size}: "
                "tokenize again with the tokenizer of this model."
            )


def token_paths(prefix: Path) -> tuple[Path, Path]:
    """``prefix.bin`` and ``prefix.idx``."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")
