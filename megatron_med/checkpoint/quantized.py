"""Fills quantised weights from a checkpoint, one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from megatron_med.checkpoint.storage import check_shapes, load_entries
from megatron_med.checkpoint.views import GlobalViews
from megatron_med.errors import CheckpointError
from megatron_med.parallel.collectives import gather_objects
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.tensor_parallel.quantized import quantized_weights


def load_quantized(folder: Path, modules: nn.Module, context: ParallelContext) -> None:
    """Reads the weights of a base, rounds each to the model's precision and quantises it before the next one is read.

    Args:
        folder: of one step.
        modules: of this rank, some of whose weights are quantised.
        context: the grid.

    Raises:
        CheckpointError: a weight is missing, of another shape, or not finite.
    """
    weights = list(quantized_weights(modules))
    if not any(gather_objects(bool(weights), context.world)):
        return
    views = GlobalViews(context, "cpu")
    meta = {w.layout.name: torch.empty(w.layout.global_shape, device="meta") for w in weights}
    reader = check_shapes(meta, folder)
    broken = []
    for weight in weights:
        shard = torch.empty(weight.layout.local_shape(context.tp), dtype=weight.dtype)
        load_entries({weight.layout.name: views.of_parameter(shard, weight.layout)}, reader, no_dist=True)
        weight.fill(shard.to(context.device))
        if not weight.is_finite():
            broken.append(weight.layout.name)
    refuse_not_quantisable(folder, broken, context)


def refuse_not_quantisable(folder: Path, broken: list[str], context: ParallelContext) -> None:
    """Refuses, on every rank, a base with weights that cannot be quantised.

    Args:
        folder: that they were read from.
        broken: names of such weights on this rank.
        context: the grid.
    """
    found = [name for names in gather_objects(broken, context.world) for name in names]
    if found:
        raise CheckpointError(
            f"{folder} holds weights that are not finite, or beyond 65,504 ({found[0]}, {len(found)} in "
            "all), which cannot be quantised. Choose another checkpoint, or leave quantize.base out."
        )
