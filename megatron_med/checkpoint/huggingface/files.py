"""Reads and writes the safetensors files of a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_med.errors import CheckpointError
from megatron_med.files import write_json

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
        with safe_open(file, framework="numpy"), file.open("rb") as opened:
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


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes tensors in shards as they come, and the index that joins the shards."""
    shards: list[Path] = []
    where: dict[str, Path] = {}
    batch: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        if batch:
            shards.append(folder / f"shard-{len(shards)}.safetensors")
            save_file(batch, shards[-1], metadata={"format": "pt"})
            shards[-1].chmod(0o666 & ~_umask())  # the library makes files for their owner alone
            where.update(dict.fromkeys(batch, shards[-1]))
            batch.clear()

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if size + nbytes > SHARD_BYTES:
            flush()
            size = 0
        batch[name] = tensor
        size += nbytes
        total += nbytes
    flush()
    if len(shards) == 1:
        shards[0].rename(folder / SINGLE)
        return
    names = {shard: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i, shard in enumerate(shards, start=1)}
    for shard, name in names.items():
        shard.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[shard] for name, shard in where.items()}}
    write_json(folder / INDEX, index)


def _umask() -> int:
    """Permissions that new files do not get."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _weight_files(folder: Path) -> list[Path]:
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER}), which would be left out. Merge it into the model first "
            "(peft: model.merge_and_unload()), and save that."
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
