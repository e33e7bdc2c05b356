"""Adds adapters to the weights of their base: ``W + scale * B A``, computed in fp32."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_med.checkpoint import folder as folders
from megatron_med.checkpoint.adapter import base_of, lora_of, quantize_of, rows_of
from megatron_med.checkpoint.create import new_step, refuse_overlap
from megatron_med.checkpoint.folder import CheckpointState
from megatron_med.checkpoint.huggingface.verify import logits_of, sample_ids
from megatron_med.checkpoint.load import load_stage, verify_checkpoint
from megatron_med.checkpoint.storage import Reader, write_streaming
from megatron_med.config import model_from_dict
from megatron_med.config.lora import LoRATarget, targets_of
from megatron_med.errors import CheckpointError
from megatron_med.model.build import DTYPES, build_stage
from megatron_med.outputs import refuse_existing
from megatron_med.parallel.context import single_process_context
from megatron_med.parallel.parameters import ParameterLayout, parameters_with_layout
from megatron_med.parallel.tensor_parallel.layers import ParallelLinear, VocabParallelEmbedding
from megatron_med.tokenizer import Tokenizer, load_tokenizer

TOLERANCE = 1e-5
"""Largest difference of a logit between adapters and merged weights in fp32, relative to the largest logit or 1."""

_WEIGHT = re.compile(r"layers\.(\d+)\.(.+)\.weight")


def merge_adapter(
    step: Path, target: Path, *, base: Path | None = None, dtype: str = "fp32", overwrite: bool = False
) -> float:
    """Writes base and adapters as one checkpoint of whole weights. The merged model's logits are compared with those of
    base and adapters before anything is written.

    Args:
        step: of the adapters.
        target: checkpoint folder; gets ``step-00000000`` and ``latest``.
        base: where the base is; None: where it was.
        dtype: of the merged weights: fp32, bf16 or fp16.
        overwrite: replace what is in ``target``.

    Returns:
        The largest change of a logit by the rounding to ``dtype``.

    Raises:
        CheckpointError: the logits differ.
    """
    state = folders.read_state(step)
    weights = base_of(step, state, base)
    refuse_overlap(target, step, weights)
    refuse_existing(target, overwrite)
    verify_checkpoint(weights, single_process_context())
    stored = step / folders.TOKENIZER
    tokenizer = load_tokenizer(stored) if stored.is_dir() else None
    merged = _Merged(state, Reader(weights), Reader(step))
    change = _verify(step, weights, merged, tokenizer, DTYPES[dtype])
    with new_step(target, overwrite, tokenizer) as folder:
        layouts = merged.layouts
        specs = {name: (layout.global_shape, DTYPES[dtype]) for name, layout in layouts.items()}
        make = {name: partial(merged.weight, name, DTYPES[dtype]) for name in layouts}
        write_streaming(folder, specs, make)
        run = {"precision": dtype, "merged": {"adapter": str(step.resolve()), "base": str(weights.resolve())}}
        described = CheckpointState(
            model=state.model,
            tokenizer=state.tokenizer,
            chat=state.chat,
            new_rows=None if lora_of(state).train_rows else state.new_rows,
            run=run,
        )
        folders.write_state(folder, described)
    return change


class _Merged:
    """The merged weights by canonical name, each made when it is asked for."""

    def __init__(self, state: CheckpointState, base: Reader, adapters: Reader) -> None:
        model, lora = model_from_dict(state.model), lora_of(state)
        self._lora = lora
        self._new_rows = rows_of(state) or range(0)
        self._base = base
        self._adapters = adapters
        self._targets = targets_of(model, lora)
        stage = build_stage(model, single_process_context(torch.device("meta")), torch.float32)
        self.layouts: dict[str, ParameterLayout] = {layout.name: layout for layout, _ in parameters_with_layout(stage)}

    def weight(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """One weight, computed in fp32."""
        return self._in_fp32(name).to(dtype)

    def _in_fp32(self, name: str) -> Tensor:
        weight = self._base.read(name).float()
        rows_of_vocabulary = f"{name.removesuffix('weight')}new_rows.weight"
        if rows_of_vocabulary in self._adapters.shapes():
            weight[self._new_rows.start : self._new_rows.stop] += self._adapters.read(rows_of_vocabulary).float()
        found = _WEIGHT.fullmatch(name)
        if found is None:
            return weight
        rows = weight.flatten(0, -2) if weight.dim() > 2 else weight
        for target in self._targets:
            if target.linear == found[2]:
                self._add(rows, self.layouts[name], f"layers.{found[1]}.{target.linear}.lora.{target.name}", target)
        return weight

    def _add(self, rows: Tensor, layout: ParameterLayout, adapter: str, target: LoRATarget) -> None:
        a, b = self._adapters.read(f"{adapter}_A").float(), self._adapters.read(f"{adapter}_B").float()
        delta = self._lora.scale * (b @ a)
        if target.part is None:
            rows += delta
        else:
            rows.index_add_(0, layout.parts[target.part], delta)


@torch.no_grad()
def _verify(step: Path, weights: Path, merged: _Merged, tokenizer: Tokenizer | None, dtype: torch.dtype) -> float:
    stage = load_stage(step, single_process_context(), torch.float32, base=weights)
    ids = sample_ids(stage.config, tokenizer)
    beside = logits_of(stage, ids)
    quantized = quantize_of(folders.read_state(step))
    if quantized.base is not None:
        few = load_stage(step, single_process_context(), torch.float32, base=weights, quantize=quantized)
        logits_in_few_bits = logits_of(few, ids)
        del few
    for module in stage.modules():
        if isinstance(module, ParallelLinear):
            module.lora = module.new_rows = None
        elif isinstance(module, VocabParallelEmbedding):
            module.new_rows = None
    for layout, parameter in parameters_with_layout(stage):
        parameter.copy_(merged.weight(layout.name))
    limit = TOLERANCE * max(1.0, beside.abs().max().item())
    difference = (logits_of(stage, ids) - beside).abs().max().item()
    if not difference <= limit:
        raise CheckpointError(
            f"The logits of the merged weights differ by up to {difference:.3g} (limit {limit:.3g}) from those of "
            f"{weights} with {step}: nothing was written."
        )
    print(f"verified: logits of {ids.numel()} tokens differ by at most {difference:.2g}")
    if quantized.base is not None:
        print(
            f"these adapters were trained beside weights in {quantized.base}: beside those, the logits differ from the "
            f"merged model's by up to {(logits_in_few_bits - beside).abs().max().item():.2g}"
        )
    for parameter in stage.parameters():
        parameter.copy_(parameter.to(dtype))
    return (logits_of(stage, ids) - beside).abs().max().item()
