"""torch.distributed.checkpoint (DCP) with three additions: its metadata is read by a restricted unpickler, tensors can
be written one by one as they are made, and large ones in pieces.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from megatron_med.errors import CheckpointError, UserError
from megatron_med.files import open_large

_ALLOWED_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
)
_ALLOWED_NAMES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("builtins", "set"),
}


def _enum_member(kind: Any, name: Any) -> Enum:
    """``getattr(kind, name)`` of an enumeration's member: what Python 3.11.0 to 3.11.3 write for one."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"the attribute {name!r} of {kind!r} does not belong into checkpoint metadata")


class _MetadataUnpickler(pickle.Unpickler):
    """Admits DCP's own dataclasses and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if "." in name:  # would walk through a module's own imports: filesystem's os.system
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into checkpoint metadata")
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _ALLOWED_NAMES or is_dtype:
            return super().find_class(module, name)
        found = super().find_class(module, name) if module in _ALLOWED_MODULES else None
        if isinstance(found, type) and found.__module__ == module:
            return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into checkpoint metadata")


class Reader(dcp.FileSystemReader):
    """A FileSystemReader that reads ``.metadata`` once, with the restricted unpickler."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            path = self._folder / ".metadata"
            try:
                self._metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
            except Exception as error:  # of any kind, where the bytes are not what they should be
                raise CheckpointError(f"{path} is not the metadata of a checkpoint: {error}.") from error
            if not isinstance(self._metadata, Metadata):
                raise CheckpointError(f"{path} is not the metadata of a checkpoint: it holds something else.")
            if self._metadata.storage_meta is None:
                self._metadata.storage_meta = StorageMeta()
            self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    def shapes(self) -> dict[str, torch.Size]:
        """Global shape of every stored tensor."""
        entries = self.read_metadata().state_dict_metadata.items()
        return {name: entry.size for name, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def dtype(self, name: str) -> torch.dtype:
        """Type a tensor is stored in."""
        entry = self.read_metadata().state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata), f"{name} is not a tensor"
        return entry.properties.dtype

    def read(self, name: str) -> Tensor:
        """One whole tensor, without a process group."""
        tensor = torch.empty(self.shapes()[name], dtype=self.dtype(name))
        load_entries({name: tensor}, self, no_dist=True)
        return tensor


class _LargeFiles(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        with open_large(Path(path)) if mode == "wb" else Path(path).open(mode) as stream:
            yield cast(io.IOBase, stream)


def make_writer(folder: Path, **options: Any) -> dcp.FileSystemWriter:
    """A FileSystemWriter that writes large tensors in pieces; see ``open_large``."""
    writer = dcp.FileSystemWriter(folder, **options)
    writer.fs = _LargeFiles()
    return writer


class _StreamingPlanner(DefaultSavePlanner):
    """Makes each tensor while the one before it is written; nothing else holds them.

    Args:
        make: gives a tensor; in the order in which they are written.
        pool: of one thread, which makes them.
    """

    def __init__(self, make: Mapping[str, Callable[[], Tensor]], pool: Executor) -> None:
        super().__init__()
        self._make = make
        self._pool = pool
        self._following = dict(pairwise(make))
        self._coming: dict[str, Future[Tensor]] = {}

    def lookup_object(self, index: MetadataIndex) -> Any:
        tensor = (self._coming.pop(index.fqn, None) or self._begin(index.fqn)).result()
        following = self._following.get(index.fqn)
        if following is not None:
            self._coming[following] = self._begin(following)
        return tensor

    def _begin(self, name: str) -> Future[Tensor]:
        return self._pool.submit(self._make[name])


def write_streaming(
    folder: Path, specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]], make: Mapping[str, Callable[[], Tensor]]
) -> None:
    """Writes tensors one by one, each into a file of its own (DCP holds all tensors of a file until it is written),
    without a process group. The caller waits until the disk has them, as ``folder.commit`` does.

    Args:
        folder: target.
        specs: global shape and type of each tensor.
        make: gives a tensor when it is its turn, in another thread.

    Raises:
        UserError: of ``make``.
        OSError: the disk is full.
    """
    placeholders = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in specs.items()}
    writer = make_writer(folder, single_file_per_rank=False, sync_files=False)
    with _without_single_process_warning(), ThreadPoolExecutor(1) as pool:
        try:
            dcp.save(placeholders, storage_writer=writer, planner=_StreamingPlanner(make, pool), no_dist=True)
        except CheckpointException as error:
            raise first_cause(error) from error


def first_cause(error: BaseException) -> BaseException:
    """The system's or our own error behind one of DCP, which wraps them, and whose writer hides them behind its own."""
    if isinstance(error, CheckpointException):
        error = next((wrapped[0] for wrapped in error.failures.values()), error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (OSError, UserError)):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def check_shapes(entries: dict[str, Tensor], folder: Path) -> Reader:
    """Refuses a checkpoint that lacks an entry, or holds one of another shape.

    Raises:
        CheckpointError: names the first such entry.
    """
    reader = Reader(folder)
    shapes = reader.shapes()
    different = [
        name for name in sorted(entries) if name in shapes and tuple(shapes[name]) != tuple(entries[name].shape)
    ]
    if different:
        name = different[0]
        raise CheckpointError(
            f"The checkpoint {folder} holds {name} as {list(shapes[name])}, the model as {list(entries[name].shape)} "
            f"({len(different)} entries differ). Choose a checkpoint of this model."
        )
    missing = sorted(set(entries) - set(shapes))
    if missing:
        raise CheckpointError(
            f"The checkpoint {folder} does not hold {missing[0]} ({len(missing)} entries are missing). "
            "Load it with checkpoint.load_state: weights, or choose another one."
        )
    return reader


def load_entries(entries: dict[str, Tensor], reader: Reader, *, no_dist: bool) -> None:
    """Fills tensors in place from a checkpoint, converted to their types."""
    with _without_single_process_warning():
        dcp.load(entries, storage_reader=reader, no_dist=no_dist)


@contextmanager
def _without_single_process_warning() -> Iterator[None]:
    """DCP warns where there is no process group; the tools have none on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
