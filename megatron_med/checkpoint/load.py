"""Loads training state of any topology into any other."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_med.checkpoint import folder as folders
from megatron_med.checkpoint.adapter import base_of, lora_of, rows_of
from megatron_med.checkpoint.folder import CheckpointState, read_state
from megatron_med.checkpoint.moments import load_moments
from megatron_med.checkpoint.quantized import load_quantized
from megatron_med.checkpoint.storage import Reader, check_shapes, load_entries
from megatron_med.checkpoint.views import Part, belongs, moment_name, state_shards, state_views, weight_views
from megatron_med.config import ModelConfig, model_from_dict
from megatron_med.config.schema import LANGUAGE_MODEL, QuantizeConfig
from megatron_med.errors import CheckpointError
from megatron_med.model.build import NOT_QUANTIZED, build_stage
from megatron_med.model.lora import add_adapters
from megatron_med.model.transformer import Transformer
from megatron_med.optim.adamw8bit import maxima_name
from megatron_med.optim.optimizer import MOMENTS, Optimizer
from megatron_med.parallel.collectives import gather_objects
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import parameters_with_layout
from megatron_med.tokenizer import describe_difference

_FREE_FIELDS = {
    "preset",
    "init_std",
    "embedding_dropout",
    "hidden_dropout",
    "attention_dropout",
    "max_position_embeddings",
}
"""Model fields that may differ between a checkpoint and a run without changing what the weights mean."""
_HEAD_FIELDS = {"head", "num_labels", "tie_embeddings"}
"""Model fields that differ where a language model's head is replaced."""


def verify_checkpoint(folder: Path, context: ParallelContext) -> None:
    """Compares sizes and checksums with the manifest, the files shared out over the ranks.

    Raises:
        CheckpointError: names the damaged file and the step before.
    """
    fault, names, bad = None, [], []
    try:
        names = folders.check_sizes(folder)
        bad = folders.damaged_files(folder, names[context.world.rank :: context.world.size])
    except CheckpointError as error:
        fault = error.faults
    reports = gather_objects((fault, bad), context.world)
    for faults, _ in reports:
        if faults is not None:
            raise CheckpointError(faults)
    found = [name for _, part in reports for name in part]
    if found:
        raise folders.damage_error(folder, found)


def load_optimizer(
    folder: Path,
    optimizer: Optimizer,
    context: ParallelContext,
    *,
    moments: bool,
    without: Collection[str] = (),
    part: Part = "all",
    fresh: str | None = None,
) -> list[str]:
    """Fills masters and frozen weights, and moments where asked, of any topology; the caller copies the masters into
    the model.

    Args:
        folder: of one step.
        optimizer, context: of this run.
        moments: whether to load them, too.
        without: parameters whose moments are not there, since they were frozen.
        part: of the model that the folder holds.
        fresh: what the names of parameters begin with that the folder does not hold; they keep their initial weights.

    Returns:
        What the user is to be told.
    """
    shards = state_shards(optimizer, moments, part)
    if fresh is not None:
        shards = {name: shard for name, shard in shards.items() if not name.startswith(fresh)}
    in_8_bit: set[str] = set()
    told: list[str] = []
    if moments:
        in_8_bit, told = load_moments(folder, Reader(folder), optimizer, context, without)
    for name in in_8_bit.union(without):
        for moment in MOMENTS:
            shards.pop(moment_name(moment, name), None)
            shards.pop(moment_name(maxima_name(moment), name), None)
    _load(state_views(shards, optimizer, context), folder)
    return told


def load_stage(
    folder: Path,
    context: ParallelContext,
    dtype: torch.dtype,
    layers_per_stage: list[int] | None = None,
    base: str | Path | None = None,
    quantize: QuantizeConfig = NOT_QUANTIZED,
) -> Transformer:
    """This rank's stage of the model in a step folder, adapters beside the weights of their base.

    Args:
        folder: of one step.
        context: the grid.
        dtype: of the arithmetic.
        layers_per_stage: layers of each stage; None splits them by cost.
        base: where the base of adapters is; None: where it was.
        quantize: what the matrices are quantised to while they are read.
    """
    state = read_state(folder)
    model = model_from_dict(state.model)
    stage = build_stage(model, context, dtype, layers_per_stage, quantize)
    if state.adapter is None:
        load_weights(folder, stage, context)
        load_quantized(folder, stage, context)
        return stage
    add_adapters([stage], model, lora_of(state), rows_of(state))
    weights = base_of(folder, state, base)
    verify_checkpoint(weights, context)
    load_weights(weights, stage, context, "base")
    load_quantized(weights, stage, context)
    load_weights(folder, stage, context, "adapters")
    return stage


def load_weights(folder: Path, module: nn.Module, context: ParallelContext, part: Part = "all") -> None:
    """Fills a stage's parameters, converted to their type."""
    _load(weight_views(module, context, part), folder)
    loaded = parameters_with_layout(module)
    refuse_not_finite(
        folder, ((layout.name, parameter) for layout, parameter in loaded if belongs(layout, part)), context
    )


def refuse_not_finite(folder: Path, parameters: Iterable[tuple[str, Tensor]], context: ParallelContext) -> None:
    """Refuses weights with NaN or infinity, on every rank where one has such.

    Args:
        folder: that they were read from.
        parameters: of this rank, by canonical name.
        context: the grid.
    """
    broken = [name for name, parameter in parameters if not parameter.isfinite().all()]
    if any(gather_objects(bool(broken), context.world)):
        what = (
            f"{broken[0]} and {len(broken) - 1} more" if len(broken) > 1 else "".join(broken) or "another rank's part"
        )
        raise CheckpointError(
            f"{folder} holds weights that are not finite ({what}): NaN, infinity, or too large for this precision. "
            "Choose another checkpoint, or --precision fp32."
        )


def new_head(state: CheckpointState, model: ModelConfig) -> bool:
    """Whether a model gets a head that scores sequences on top of a checkpoint of a language model."""
    return model.head != LANGUAGE_MODEL and state.model.get("head", LANGUAGE_MODEL) == LANGUAGE_MODEL


def check_model(state: CheckpointState, model: ModelConfig, folder: Path) -> None:
    """Refuses a checkpoint of another model, field by field; a language model's may get another head."""
    mine, stored = asdict(model), {"head": LANGUAGE_MODEL, "num_labels": 0} | state.model
    free = _FREE_FIELDS | (_HEAD_FIELDS if new_head(state, model) else set())
    different = [
        f"{name} is {stored.get(name)!r} in the checkpoint and {value!r} in the configuration"
        for name, value in mine.items()
        if name not in free and stored.get(name) != value
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
    difference = describe_difference(state.tokenizer, tokenizer)
    if difference:
        raise CheckpointError(
            f"The checkpoint {folder} was made with another tokenizer than the data ({difference}). "
            f"Tokenize the data with the tokenizer in {folder / folders.TOKENIZER}."
        )


def _load(entries: dict[str, Tensor], folder: Path) -> None:
    reader = check_shapes(entries, folder)
    load_entries(entries, reader, no_dist=not dist.is_initialized())
