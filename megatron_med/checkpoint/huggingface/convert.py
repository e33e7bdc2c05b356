"""Import and export. Memory stays at a few tensors; a folder appears under its name only when it is whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megatron_med.checkpoint import folder as folders
from megatron_med.checkpoint.adapter import MERGE
from megatron_med.checkpoint.create import new_step, refuse_overlap
from megatron_med.checkpoint.folder import CheckpointState
from megatron_med.checkpoint.huggingface.card import CARD, model_card
from megatron_med.checkpoint.huggingface.checks import check_tensors
from megatron_med.checkpoint.huggingface.config import from_huggingface, read_config, to_huggingface
from megatron_med.checkpoint.huggingface.files import open_tensors, write_tensors
from megatron_med.checkpoint.huggingface.mapping import TensorMap, tensor_maps
from megatron_med.checkpoint.huggingface.tokenizer import generation_config, padding_of, write_tokenizer
from megatron_med.checkpoint.huggingface.verify import verify_logits
from megatron_med.checkpoint.load import verify_checkpoint
from megatron_med.checkpoint.storage import Reader, write_streaming
from megatron_med.config import ModelConfig, model_from_dict
from megatron_med.config.schema import MULTIPLE_CHOICE
from megatron_med.errors import CheckpointError
from megatron_med.files import write_json, write_text
from megatron_med.model.build import DTYPES
from megatron_med.outputs import output_folder, refuse_existing
from megatron_med.parallel.context import single_process_context
from megatron_med.tokenizer import Tokenizer, describe_difference, load_tokenizer
from megatron_med.tokenizer.load import has_tokenizer

T = TypeVar("T")

_HF_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def import_huggingface(
    source: Path, target: Path, *, tokenizer: str | None = None, verify: bool = False, overwrite: bool = False
) -> Path:
    """Turns a Hugging Face folder into a checkpoint that any topology loads.

    Args:
        source: folder with config.json and safetensors.
        target: checkpoint folder; gets ``step-00000000`` and ``latest``.
        tokenizer: used instead of the folder's own. Tokens that it adds after the model's vocabulary get new rows.
        verify: compare the logits of both models first, and refuse where they differ.
        overwrite: replace what is in ``target``.

    Returns:
        The step folder.
    """
    pretrained = from_huggingface(read_config(source))
    refuse_overlap(target, source)
    refuse_existing(target, overwrite)
    loaded = _tokenizer_of(source, tokenizer, pretrained)
    config = replace(pretrained, vocab_size=max(pretrained.vocab_size, loaded.vocab_size if loaded else 0))
    new_rows = [pretrained.vocab_size, config.vocab_size] if config.vocab_size > pretrained.vocab_size else None
    with new_step(target, overwrite, loaded) as partial:
        precision = _write_weights(source, partial, config, pretrained.vocab_size)
        state = CheckpointState(
            model=asdict(config),
            tokenizer=loaded.describe() if loaded else None,
            new_rows=new_rows,
            run={"precision": precision, "imported": True},
        )
        folders.write_state(partial, state)
        if verify:
            verify_logits(source, partial, config, loaded, compared=pretrained.vocab_size)
    return folders.step_folder(target, 0)


def _write_weights(source: Path, partial: Path, config: ModelConfig, rows: int) -> str:
    """Streams all tensors into a checkpoint folder, in the types they have; returns the name of their precision.

    ``rows`` is the size of the source's vocabulary; the rows of tokens after it are made here.
    """
    files = open_tensors(source)
    maps = list(tensor_maps(config))
    check_tensors(files, maps, config, rows)
    dtypes = {m.layout.name: files.joint_dtype(m.hf_names) for m in maps}
    specs = {m.layout.name: (m.layout.global_shape, dtypes[m.layout.name]) for m in maps}
    make = {m.layout.name: (lambda m=m: m.to_canonical(files.read, dtypes[m.layout.name])) for m in maps}
    write_streaming(partial, specs, make)
    return _NAMES.get(dtypes["embedding.word.weight"], "fp32")


def export_huggingface(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    verify: bool = False,
    overwrite: bool = False,
    results: Sequence[Path] = (),
) -> None:
    """Writes config, generation config, tokenizer, weights and a model card as a Hugging Face folder.

    Args:
        source: RUN, RUN/checkpoints or one step.
        target: the new folder.
        dtype: fp32, bf16 or fp16; by default the precision of the run or of the imported weights.
        verify: compare the logits of both models first, and refuse where they differ.
        overwrite: replace ``target``.
        results: folders of ``megatron-med evaluate`` whose scores the card tells.
    """
    step = folders.resolve_checkpoint(source)
    refuse_overlap(target, step)
    refuse_existing(target, overwrite)
    verify_checkpoint(step, single_process_context())
    state = folders.read_state(step)
    if state.adapter is not None:
        raise CheckpointError(
            f"{step} holds adapters only. megatron-med adapter export writes them as a PEFT folder; for a whole "
            f"model merge them first: {MERGE.format(adapter=step)}"
        )
    config = model_from_dict(state.model)
    if config.head == MULTIPLE_CHOICE:
        raise CheckpointError(
            f"{step} has a head that scores the options of a question, with a bias: no class of transformers holds it "
            "(...ForSequenceClassification has none). Use it here: megatron-med evaluate --score head."
        )
    torch_dtype = DTYPES[dtype or state.run.get("precision", "fp32")]
    stored_tokenizer = step / folders.TOKENIZER
    loaded = load_tokenizer(stored_tokenizer) if stored_tokenizer.is_dir() else None
    if loaded is not None:
        _check_stored(state, loaded, stored_tokenizer)

    with output_folder(target, overwrite) as partial:
        maps = list(tensor_maps(config))
        shapes = {name: shape for m in maps for name, shape in m.hf_shapes(config.vocab_size).items()}
        write_tensors(partial, shapes, torch_dtype, _one_ahead(_exported(step, maps, torch_dtype)))
        labels = state.head["labels"] if state.head else ()
        pad = padding_of(loaded) if loaded is not None and labels else None
        bos = loaded.bos_id if loaded else None
        eos = loaded.eod_id if loaded else None
        write_json(partial / "config.json", to_huggingface(config, _HF_DTYPES[torch_dtype], bos, eos, labels, pad))
        write_json(partial / "generation_config.json", generation_config(loaded, state.chat))
        if loaded is not None:
            write_tokenizer(partial, loaded, config.max_position_embeddings, state.chat, pad)
        write_text(partial / CARD, model_card(target.resolve().name, step, config, state, results))
        if verify:
            verify_logits(partial, step, config, loaded, rounded=torch_dtype)


def _exported(step: Path, maps: Sequence[TensorMap], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    reader = Reader(step)
    for tensor_map in maps:
        tensor = reader.read(tensor_map.layout.name).to(dtype)
        yield from tensor_map.to_hf(tensor).items()


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _tokenizer_of(source: Path, override: str | None, config: ModelConfig) -> Tokenizer | None:
    if override is None and not has_tokenizer(source):
        return None
    loaded = load_tokenizer(override or source)
    if loaded.vocab_size - len(loaded.added_tokens) > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer {loaded.files[0]} has {loaded.vocab_size} pieces, the model {config.vocab_size}: "
            "they do not belong together. Give the right one with --tokenizer."
        )
    return loaded


def _check_stored(state: CheckpointState, loaded: Tokenizer, folder: Path) -> None:
    difference = describe_difference(state.tokenizer, loaded.describe()) if state.tokenizer else None
    if difference:
        raise CheckpointError(
            f"{folder} is not the tokenizer that the model was trained with ({difference}): restore its files."
        )
