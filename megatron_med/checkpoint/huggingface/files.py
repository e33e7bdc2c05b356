"""Reads and writes the safetensors files of a Hugging Face folder, a few tensors at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_med.errors import CheckpointError
from megatron_med.files import write_json

SHARD_BYTES = 1_000_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class TensorFiles:
    """The tensors of a folder by name, read when asked for.

    GPT-2's own hub files leave out the prefix ``transformer.``; both spellings are found.
    """

    def __init__(self, handles: dict[str, Any]) -> None:
        self._handles = handles

    def names(self) -> list[str]:
        """Names of all tensors."""
        return sorted(self._handles)

    def spelling(self, name: str) -> str:
        """The name under which the folder holds a tensor."""
        for candidate in (name, name.removeprefix("transformer.")):
            if candidate in self._handles:
                return candidate
        raise CheckpointError(f"The Hugging Face folder has no tensor {name}: its config.json promises one.")

    def read(self, name: str) -> Tensor:
        """One tensor."""
        name = self.spelling(name)
        return self._handles[name].get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, without reading it."""
        name = self.spelling(name)
        return self._handles[name].get_slice(name)[:0].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        name = self.spelling(name)
        return tuple(self._handles[name].get_slice(name).get_shape())


@contextmanager
def open_tensors(folder: Path) -> Iterator[TensorFiles]:
    """Opens every safetensors file of a folder.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    files = _weight_files(folder)
    with ExitStack() as stack:
        handles: dict[str, Any] = {}
        for file in files:
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except Exception as error:  # the library raises its own kinds
                raise CheckpointError(f"{file} is not an intact safetensors file: {error}.") from error
            handles.update(dict.fromkeys(handle.keys(), handle))
        yield TensorFiles(handles)


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


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise CheckpointError(f"{folder / INDEX} names {missing[0]}, which is not there. Fetch the missing files.")
        return [folder / name for name in sorted(names)]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if list(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} holds pickled weights (*.bin), which can run code and are never read. Convert them with "
            "transformers: model.save_pretrained(DIR, safe_serialization=True)."
        )
    raise CheckpointError(f"{folder} holds no model.safetensors. Check --from.")
