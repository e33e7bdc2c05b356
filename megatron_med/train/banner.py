"""What a run says of itself before it begins."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_med import __version__
from megatron_med.checkpoint.folder import read_state
from megatron_med.config import Config
from megatron_med.data.streams import Corpora
from megatron_med.kernels.backend import describe
from megatron_med.kernels.linear import has_bf16_products
from megatron_med.model.flops import parameter_count
from megatron_med.parallel.context import ParallelContext
from megatron_med.train.loading import Source
from megatron_med.words import counted

_SHARDED = {"none": "", "optimizer": ", optimizer states cut", "full": ", parameters cut (FSDP)"}
_NAMES_SHOWN = 3


def banner(config: Config, context: ParallelContext, corpora: Corpora, source: Source | None) -> list[str]:
    """Model, grid, device, data, where it begins and where it writes, kernels: a line each.

    Args:
        config: with its steps.
        context: of rank 0.
        corpora: of the training data.
        source: what the run goes on from.
    """
    lines = {
        "model": _model(config),
        "grid": _grid(config, context),
        "device": _device(config, context),
        "data": _data(config, corpora, source),
        "begins": _begins(source),
        "writes": _writes(config),
    }
    return [f"megatron_med {__version__}", *(f"  {name:<8} {text}" for name, text in lines.items()), describe()]


def _model(config: Config) -> str:
    model = config.model
    name = f"{model.preset} ({model.family})" if model.preset else model.family
    heads = f"{model.num_attention_heads} heads"
    if model.num_query_groups != model.num_attention_heads:
        heads += f" in {model.num_query_groups} groups"
    return (
        f"{name}: {parameter_count(model):,} parameters; {model.num_layers} layers, {model.hidden_size:,} wide, "
        f"{heads}, vocabulary {model.vocab_size:,}"
    )


def _grid(config: Config, context: ParallelContext) -> str:
    parallel, train = config.parallel, config.train
    sizes = f"tensor {context.tp.size} x pipeline {context.pp.size} x data {context.batch.size}"
    cut = _SHARDED[parallel.sharding] if context.batch.size > 1 else ""
    schedule = f", {parallel.schedule}" if context.pp.size > 1 else ""
    micro_batches = train.global_batch_size // (train.micro_batch_size * context.batch.size)
    return (
        f"{counted(context.world.size, 'rank')}: {sizes}{cut}{schedule}; a step is {train.global_batch_size:,} "
        f"samples, {counted(micro_batches, 'micro-batch', 'es')} of {train.micro_batch_size} on each replica"
    )


def _device(config: Config, context: ParallelContext) -> str:
    if context.device.type == "cuda":
        name = torch.cuda.get_device_name(context.device)
    else:
        name = f"CPU ({platform.machine()}, {counted(torch.get_num_threads(), 'thread')} a rank)"
    slow = ""
    if config.precision == "bf16" and not has_bf16_products(context.device):
        slow = "; bf16 products are emulated here (no avx512_bf16 or amx_bf16): --precision fp32 is faster"
    return f"{name}, {config.precision}, torch {torch.__version__}{slow}"


def _data(config: Config, corpora: Corpora, source: Source | None) -> str:
    batch, one_pass = config.train.global_batch_size, corpora.one_pass()
    done = read_state(source.step).step if source is not None and source.step is not None and source.everything else 0
    steps = max(0, config.train.steps - done)
    read = f"read {steps * batch:,}: {steps * batch / max(1, one_pass):.3g} epochs"
    left = f"steps {done + 1:,} to {config.train.steps:,} {read}"
    if not steps:
        left = f"nothing is left to do: step {done:,} of {config.train.steps:,}"
    first = "" if len(config.data.train) < 2 else " before the first corpus repeats"
    return (
        f"{corpora.held()}, {counted(one_pass, 'sample')} of {config.data.sequence_length:,} tokens{first}; "
        f"{left} ({_named([entry.path for entry in config.data.train])})"
    )


def _begins(source: Source | None) -> str:
    if source is None:
        return "with initial weights"
    what = "where it stopped: " if source.is_own else "with optimizer and position of " if source.everything else ""
    if source.step is None:
        return f"with fresh adapters beside {source.base}"
    beside = f" beside {source.base}" if source.base is not None else ""
    return f"{what or 'with the weights of '}{source.step}{beside}"


def _writes(config: Config) -> str:
    interval = config.checkpoint.interval
    often = f"every {interval:,} steps and " if interval else ""
    return f"{config.train.output_dir}: a checkpoint {often}at the end, metrics.jsonl"


def _named(paths: Sequence[str]) -> str:
    names = [Path(path).name for path in paths]
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
