"""Opens plain, gzip and Zstandard files as bytes. A file that is cut short is an error, never a silent end."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import zstandard

from megatron_med.errors import DataError

LONGEST_LINE = 1 << 24
"""Bytes of a line that are read. Tokenizers need hundreds of times the memory of a text, and no article or book is
longer; a file without line ends is not read whole."""
TOO_LONG = f"longer than {LONGEST_LINE >> 20} MiB, as no document should be"

_CHUNK = 1 << 18
_LARGEST_WINDOW = 1 << 31  # what `zstd --long=31` writes


class _ZstandardReader(io.RawIOBase):
    """Frames one after the other; raises EOFError where the last one is not whole."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
        self._started = False
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._pending:
            chunk = self._raw.read(_CHUNK)
            if not chunk:
                if self._started:
                    raise EOFError("the last Zstandard frame is not whole")
                return 0
            self._pending = memoryview(self._decompress(chunk))
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def _decompress(self, chunk: bytes) -> bytes:
        parts = []
        while chunk:
            parts.append(self._frame.decompress(chunk))
            self._started = not self._frame.eof
            chunk = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
        return b"".join(parts)

    def close(self) -> None:
        self._raw.close()
        super().close()


def is_compressed(path: Path) -> bool:
    """Whether a file's name says that it is compressed."""
    return path.suffix in (".gz", ".zst")


@contextmanager
def open_input(path: Path) -> Iterator[BinaryIO]:
    """A file as bytes, decompressed where its name ends in ``.gz`` or ``.zst``.

    Raises:
        DataError: inside the ``with`` block too: the file is cut short or is not of the kind its name says.
    """
    try:
        with path.open("rb") as raw, _decompressed(path, raw) as stream:
            yield stream
    except EOFError as error:
        raise DataError(f"{path} is cut short ({error}): fetch or write it again.") from error
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path} is damaged, or not what its name says ({error}): fetch or write it again.") from error


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    if is_compressed(path) and path.stat().st_size == 0:
        raise EOFError("it has no bytes")
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstandardReader(raw), _CHUNK)
    return raw


def bounded_lines(stream: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Every line with its end, and its length; of one longer than LONGEST_LINE only the beginning."""
    while content := stream.readline(LONGEST_LINE + 1):
        length = len(content)
        if length > LONGEST_LINE and not content.endswith(b"\n"):
            length += skip_line(stream)
        yield content, length


def skip_line(stream: BinaryIO) -> int:
    """Moves to the end of the line, and returns the bytes up to there."""
    skipped = 0
    while chunk := stream.readline(_CHUNK):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped
