"""Saves and loads training state from every topology into every other."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from megatron_med.checkpoint import folder as folders
from megatron_med.checkpoint.folder import CheckpointState
from megatron_med.checkpoint.storage import Reader, load_entries
from megatron_med.checkpoint.views import optimizer_views, weight_views
from megatron_med.config import ModelConfig
from megatron_med.errors import CheckpointError
from megatron_med.optim.optimizer import Optimizer
from megatron_med.parallel.collectives import broadcast_object, gather_objects
from megatron_med.parallel.context import ParallelContext
from megatron_med.tokenizer import Tokenizer

_FREE_FIELDS = {
    "preset",
    "init_std",
    "embedding_dropout",
    "hidden_dropout",
    "attention_dropout",
    "max_position_embeddings",
}
"""Model fields that may differ between a checkpoint and a run without changing what the weights mean."""


def save_checkpoint(
    target: Path,
    optimizer: Optimizer,
    context: ParallelContext,
    *,
    state: CheckpointState,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes one step and moves ``latest``; all ranks call it.

    Args:
        target: ``RUN/checkpoints/step-...``.
        optimizer: masters and moments.
        context: the grid.
        state: what ``state.json`` says.
        tokenizer: its files are copied beside the weights.

    Raises:
        CheckpointError: it could not be written, e.g. the disk is full; earlier checkpoints are untouched.
    """
    partial = folders.partial_folder(target)
    is_writer = context.world.is_first
    failure = _attempt(lambda: folders.begin(target)) if is_writer else None
    _raise_together(failure, target, context)
    try:
        dcp.save(optimizer_views(optimizer, context), storage_writer=dcp.FileSystemWriter(partial))
        failure = None
    except (CheckpointException, OSError, RuntimeError) as error:
        failure = _first_cause(error)
    if failure is None and is_writer:
        failure = _attempt(lambda: _write_companions(partial, state, tokenizer))
    _raise_together(failure, target, context)

    mine: dict[str, Any] = {}
    failure = _attempt(lambda: mine.update(folders.describe_files(partial, _share(partial, context))))
    described = gather_objects(mine, context.world)
    if failure is None and is_writer:
        files = {name: entry for part in described for name, entry in part.items()}
        failure = _attempt(lambda: folders.commit(target, dict(sorted(files.items()))))
    _raise_together(failure, target, context)


def verify_checkpoint(folder: Path, context: ParallelContext) -> None:
    """Compares sizes and checksums with the manifest, the files shared out over the ranks.

    Raises:
        CheckpointError: names the damaged file and the step before.
    """
    names = folders.check_sizes(folder)
    bad = folders.damaged_files(folder, names[context.world.rank :: context.world.size])
    found = [name for part in gather_objects(bad, context.world) for name in part]
    if found:
        raise folders.damage_error(folder, found)


def load_optimizer(folder: Path, optimizer: Optimizer, context: ParallelContext, *, moments: bool) -> None:
    """Fills masters, and moments where asked, of any topology; the caller publishes them to the model."""
    entries = optimizer_views(optimizer, context, moments)
    _load(entries, folder)


def load_weights(folder: Path, module: nn.Module, context: ParallelContext) -> None:
    """Fills a stage's parameters, converted to their type."""
    _load(weight_views(module, context), folder)


def check_model(state: CheckpointState, model: ModelConfig, folder: Path) -> None:
    """Refuses a checkpoint of another model, field by field."""
    mine = asdict(model)
    different = [
        f"{name} is {state.model.get(name)!r} in the checkpoint and {value!r} in the configuration"
        for name, value in mine.items()
        if name not in _FREE_FIELDS and state.model.get(name) != value
    ]
    stored_positions = state.model.get("max_position_embeddings")
    if model.family == "gpt2" and stored_positions != model.max_position_embeddings:
        different.append(
            f"max_position_embeddings is {stored_positions} in the checkpoint and "
            f"{model.max_position_embeddings} in the configuration (gpt2 learns positions)"
        )
    if different:
        raise CheckpointError(
            [f"The checkpoint {folder} is of another model: model.{line}. Make them equal." for line in different]
        )


def check_tokenizer(state: CheckpointState, tokenizer: dict[str, Any] | None, folder: Path) -> None:
    """Refuses a checkpoint that was trained with another vocabulary."""
    if state.tokenizer is None or tokenizer is None:
        return
    stored, given = state.tokenizer, tokenizer
    if stored["vocab_size"] != given["vocab_size"]:
        raise CheckpointError(
            f"The checkpoint {folder} was made with a vocabulary of {stored['vocab_size']}, the data with one of "
            f"{given['vocab_size']}. Tokenize the data with the tokenizer in {folder / folders.TOKENIZER}."
        )
    if stored["fingerprint"] != given["fingerprint"]:
        raise CheckpointError(
            f"The checkpoint {folder} was made with another tokenizer than the data: they give different ids. "
            f"Tokenize the data with the tokenizer in {folder / folders.TOKENIZER}."
        )


def _load(entries: dict[str, Tensor], folder: Path) -> None:
    reader = Reader(folder)
    missing = sorted(set(entries) - set(reader.shapes()))
    if missing:
        raise CheckpointError(
            f"The checkpoint {folder} does not hold {missing[0]} ({len(missing)} entries are missing). "
            "Load it with checkpoint.load_state: weights, or choose another one."
        )
    load_entries(entries, reader, no_dist=not dist.is_initialized())


def _share(partial: Path, context: ParallelContext) -> list[str]:
    """The files that this rank hashes: its own data files; the writer also takes the rest."""
    names = folders.file_names(partial)
    mine = [name for name in names if name.startswith(f"__{context.world.rank}_")]
    if context.world.is_first:
        mine += [name for name in names if not name.startswith("__")]
    return mine


def _write_companions(partial: Path, state: CheckpointState, tokenizer: Tokenizer | None) -> None:
    folders.write_state(partial, state)
    if tokenizer is not None:
        tokenizer.copy_to(partial / folders.TOKENIZER)


def _attempt(action: Any) -> str | None:
    """Runs an action; the text of its OSError instead of raising it, so that all ranks can stop together."""
    try:
        action()
    except OSError as error:
        return str(error)
    return None


def _raise_together(failure: str | None, target: Path, context: ParallelContext) -> None:
    """All ranks raise the first rank's failure, after the partial folder is gone."""
    failures = [text for text in gather_objects(failure, context.world) if text is not None]
    if not failures:
        return
    if context.world.is_first:
        shutil.rmtree(folders.partial_folder(target), ignore_errors=True)
    broadcast_object(None, context.world)
    latest = target.parent / folders.LATEST
    stays = f"The last good checkpoint stays: {latest.read_text().strip()}." if latest.is_file() else ""
    free = shutil.disk_usage(target.parent).free
    raise CheckpointError(
        f"The checkpoint {target} could not be written: {failures[0]} ({free / 1e6:,.0f} MB are free there). "
        f"Make room and start again. {stays}"
    )


def _first_cause(error: BaseException) -> str:
    """The system's own words where there are any: DCP wraps them, and its writer hides them behind its own."""
    if isinstance(error, CheckpointException):
        error = next((wrapped[0] for wrapped in error.failures.values()), error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]
