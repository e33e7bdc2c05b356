"""Reads and writes the safetensors files of a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_med.errors import CheckpointError
from megatron_med.files import open_large, write_json

SHARD_BYTES = 1_000_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
_OTHER_COPIES = "consolidated"
"""Beginning of the names of files in which some hub folders hold the same weights once more."""

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in its file, in bytes, and what the file says of it."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFiles:
    """The tensors of a folder by name, read when asked for.

    The library's own reader maps whole files into memory as private pages, which count against a memory limit.
    GPT-2's own hub files leave out the prefix ``transformer.``; both spellings are found.
    """

    def __init__(self, stored: dict[str, _Stored]) -> None:
        self._stored = stored

    def names(self) -> list[str]:
        """Names of all tensors."""
        return sorted(self._stored)

    def __contains__(self, name: str) -> bool:
        return any(candidate in self._stored for candidate in _spellings(name))

    def spelling(self, name: str) -> str:
        """The name under which the folder holds a tensor."""
        for candidate in _spellings(name):
            if candidate in self._stored:
                return candidate
        raise CheckpointError(f"The Hugging Face folder has no tensor {name}: its config.json promises one.")

    def read(self, name: str) -> Tensor:
        """One tensor."""
        stored = self._stored[self.spelling(name)]
        content = np.fromfile(stored.file, np.uint8, stored.end - stored.begin, offset=stored.begin)
        return torch.from_numpy(content).view(self.dtype(name)).view(stored.shape)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, without reading it.

        Raises:
            CheckpointError: it is no floating-point type of 16 bits or more.
        """
        spelling = self.spelling(name)
        kind = self._stored[spelling].kind
        if kind not in _FLOATS:
            raise CheckpointError(
                f"{spelling} is stored as {kind}: quantized weights need their scales and are not imported. Save the "
                "model in bf16, fp16 or fp32."
            )
        return _FLOATS[kind]

    def joint_dtype(self, names: Iterable[str]) -> torch.dtype:
        """Type that holds all of these tensors without loss."""
        return reduce(torch.promote_types, map(self.dtype, names))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._stored[self.spelling(name)].shape


def _spellings(name: str) -> tuple[str, str]:
    return name, name.removeprefix("transformer.")


def open_tensors(folder: Path) -> TensorFiles:
    """Reads what every safetensors file of a folder holds.

    Raises:
        CheckpointError: there are none, they are damaged, or some belong to another model.
    """
    stored: dict[str, _Stored] = {}
    for file in _weight_files(folder):
        for name, tensor in _read_header(file).items():
            if name in stored:
                raise CheckpointError(
                    f"{name} stands in {stored[name].file} and in {file}: remove the one that does not belong there."
                )
            stored[name] = tensor
    return TensorFiles(stored)


def _read_header(file: Path) -> dict[str, _Stored]:
    """What a file says of its tensors: eight bytes that hold the length, then JSON. The library checks that it is
    true of the file (https://huggingface.co/docs/safetensors)."""
    try:
        with file.open("rb") as opened, safe_open(file, framework="numpy"):
            length = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(length))
    except OSError:
        raise
    except Exception as error:  # the library raises its own kinds
        raise CheckpointError(f"{file} is not an intact safetensors file: {error}.") from error
    header.pop("__metadata__", None)
    return {
        name: _Stored(file, entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    }


def write_tensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes tensors in shards as they come, and the index that joins the shards. The library's own writer would hold
    a whole shard.

    Args:
        folder: gets ``model.safetensors``, or several files and their index.
        shapes: of all tensors by name, in the order in which they come.
        dtype: of all of them.
        tensors: with their names.
    """
    shards = _cut_into_shards(shapes, dtype.itemsize)
    files = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    coming = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        header, places = _layout({name: shapes[name] for name in names}, dtype)
        with open_large(folder / file) as opened:
            opened.write(header)
            for expected, (name, tensor) in zip(names, coming):  # noqa: B905  (the next shard takes the rest)
                assert name == expected, f"{name} came instead of {expected}"
                assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shapes[name]), f"{name}: {tensor.shape}"
                opened.seek(places[name])
                opened.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(map(math.prod, shapes.values())) * dtype.itemsize
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _cut_into_shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> list[list[str]]:
    """Names of each file of at most SHARD_BYTES; a tensor that is larger has a file of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _layout(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file (its length, then JSON, filled up to a multiple of eight bytes) and where each tensor
    goes: by name, as the library has it."""
    kind = next(kind for kind, known in _FLOATS.items() if known == dtype)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        begin, end = end, end + math.prod(shapes[name]) * dtype.itemsize
        entries[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + entries[name]["data_offsets"][0] for name in shapes}


def _weight_files(folder: Path) -> list[Path]:
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER}), which would be left out. Import the model without it, then the "
            "adapter with megatron-med adapter import; or merge it first (peft: model.merge_and_unload())."
        )
    used = _indexed(folder) if (folder / INDEX).is_file() else [folder / SINGLE]
    if not used[0].is_file():
        if list(folder.glob("*.bin")):
            raise CheckpointError(
                f"{folder} holds pickled weights (*.bin), which can run code and are never read. Convert them with "
                "transformers: model.save_pretrained(DIR, safe_serialization=True)."
            )
        raise CheckpointError(f"{folder} holds no {SINGLE}. Check --from.")
    unread = sorted(set(folder.glob("*.safetensors")) - set(used))
    unread = [file for file in unread if not file.name.startswith(_OTHER_COPIES)]
    if unread:
        raise CheckpointError(
            f"{folder} also holds {unread[0].name}, which is no part of the model in {', '.join(_shown(used))}: remove "
            "what does not belong to it."
        )
    return used


def _indexed(folder: Path) -> list[Path]:
    path = folder / INDEX
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an index of safetensors files ({error!r}). Fetch it again.") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        named = f"names {missing[0]}, which is not there" if missing else "names no file"
        raise CheckpointError(f"{path} {named}. Fetch the missing files.")
    return [folder / name for name in names]


def _shown(files: list[Path]) -> list[str]:
    names = [file.name for file in files]
    return names if len(names) < 3 else [names[0], "...", names[-1]]
