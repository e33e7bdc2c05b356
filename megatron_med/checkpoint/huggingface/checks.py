"""What a Hugging Face folder must hold for an import: every tensor of the model, in its shape, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron_med.checkpoint.huggingface.files import TensorFiles
from megatron_med.checkpoint.huggingface.mapping import IGNORED, TensorMap
from megatron_med.config import ModelConfig
from megatron_med.errors import CheckpointError

_HEAD = "lm_head.weight"
_SHOWN = 4


def check_tensors(files: TensorFiles, maps: Sequence[TensorMap], config: ModelConfig, rows: int) -> None:
    """Compares the tensors of a folder with those that its model has.

    Args:
        files: of the folder.
        maps: of the model.
        config: of the model.
        rows: vocabulary of the folder.

    Raises:
        CheckpointError: one fault for each tensor that is missing, of another shape, quantized, or nobody's.
    """
    faults: list[str] = []
    for tensor_map in maps:
        for name, shape in tensor_map.hf_shapes(rows).items():
            faults += _faults(files, name, shape, tensor_map.entry.vocabulary)
    if len(faults) > _SHOWN:  # another config.json altogether
        faults[_SHOWN:] = [f"{len(faults) - _SHOWN} more tensors do not fit either."]
    read = {files.spelling(name) for tensor_map in maps for name in tensor_map.hf_names if name in files}
    left = [name for name in files.names() if name not in read and not IGNORED[config.family].fullmatch(name)]
    if config.tie_embeddings and _HEAD in left:
        left.remove(_HEAD)
        embedding = next(m.hf_names[0] for m in maps if m.layout.name == "embedding.word.weight")
        faults += _tied_faults(files, embedding)
    if left:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        faults.append(
            f"The folder also holds {', '.join(left[:_SHOWN])}{more}, which a {config.family} model with this "
            "config.json does not have: it is another model than its model_type says, or an adapter that was not "
            "merged."
        )
    if faults:
        raise CheckpointError(faults)


def _faults(files: TensorFiles, name: str, shape: tuple[int, ...], is_vocabulary: bool) -> Iterator[str]:
    try:
        found, spelling = files.shape(name), files.spelling(name)
        files.dtype(name)
    except CheckpointError as error:
        yield from error.faults
        return
    if is_vocabulary and found[1:] == shape[1:] and found[0] != shape[0]:
        yield (
            f"{spelling} has {found[0]} rows, config.json a vocab_size of {shape[0]}: the folder's files do not belong "
            "together."
        )
    elif found != shape:
        hint = " It is transposed." if found == shape[::-1] else ""
        yield (
            f"{spelling} has the shape {list(found)}, which does not fit config.json: that makes it {list(shape)}."
            f"{hint}"
        )


def _tied_faults(files: TensorFiles, embedding: str) -> Iterator[str]:
    """A head that is stored although it is tied must be the embedding."""
    is_same = files.shape(_HEAD) == files.shape(embedding) and torch.equal(files.read(_HEAD), files.read(embedding))
    if not is_same:
        yield (
            f"config.json ties the head to the embedding (tie_word_embeddings), but {_HEAD} is not "
            f"{files.spelling(embedding)}. Set tie_word_embeddings to false, or remove {_HEAD}."
        )
