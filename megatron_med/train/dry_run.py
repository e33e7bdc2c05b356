"""``python -m megatron_med.train CONFIG.yaml --dry-run --world-size 128 --rank 77``: one rank of a cluster that is not
there.

The real code sets up configuration, groups, model, optimizer, schedule and checkpoint layout and trains two steps, on
tensors without data (FakeTensorMode) and with collectives that move nothing (torch's fake backend). What would fail
on the cluster for its shapes or groups fails here first; the memory it would take is told.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_med.checkpoint.folder import read_state
from megatron_med.checkpoint.load import check_model, check_tokenizer
from megatron_med.checkpoint.storage import check_shapes
from megatron_med.checkpoint.views import Part, state_shards, state_views
from megatron_med.config import Config, load_config
from megatron_med.data.cache import cache_folder
from megatron_med.data.indexed import token_paths
from megatron_med.data.loader import SampleStream
from megatron_med.data.sample import Sample, without_borders
from megatron_med.data.sources import find_tokenizer
from megatron_med.data.streams import open_split
from megatron_med.errors import EXIT_BAD_INPUT, EXIT_DONE, ConfigError, UserError
from megatron_med.kernels.backend import ask_for, serving_on
from megatron_med.launch.fake import start_fake_process_group
from megatron_med.optim.groups import check_groups
from megatron_med.parallel.context import ParallelContext, create_context
from megatron_med.parallel.pipeline_parallel.schedule import GENERATORS, Action, Schedule
from megatron_med.tokenizer import Tokenizer
from megatron_med.tracing.recorder import Recorder, answer, group_labels
from megatron_med.tracing.trace import Trace
from megatron_med.train.loading import Source, find_source, rows_to_train
from megatron_med.train.setup import build_train_module, make_loader
from megatron_med.train.step import TrainModule, train_step
from megatron_med.train.timers import StepTimer

STEPS = 2
GIB = 2**30


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser("megatron_med.train --dry-run", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", required=True)
    parser.add_argument("--world-size", type=int, required=True, help="ranks of the cluster")
    parser.add_argument("--rank", type=int, default=0, help="the rank that this process is (default 0)")
    parser.add_argument(
        "--micro-batches",
        type=int,
        default=0,
        help="of each step (default: two more than chunks in the pipeline: then every stage has run all it ever does)",
    )
    own, rest = parser.parse_known_args(arguments)
    try:
        if "RANK" in os.environ:
            raise ConfigError("--dry-run is one process: start it with python, not with torchrun.")
        if own.world_size < 1 or own.micro_batches < 0:
            raise ConfigError(
                f"--world-size is {own.world_size} and --micro-batches {own.micro_batches}: the first must be at "
                "least 1, the second at least 0."
            )
        if not 0 <= own.rank < own.world_size:
            raise ConfigError(
                f"--rank is {own.rank}: it must lie between 0 and --world-size - 1 = {own.world_size - 1}."
            )
        config = load_config(rest, own.world_size)
        with serving_on("cuda"):
            for line in dry_run(config, own.world_size, own.rank, own.micro_batches):
                print(line, flush=True)
    except UserError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return EXIT_BAD_INPUT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return EXIT_DONE


def dry_run(config: Config, world_size: int, rank: int, micro_batches: int = 0) -> Iterator[str]:
    """Sets up one rank and trains two steps, telling about each part as it is done.

    Args:
        config: a valid configuration.
        world_size, rank: of the cluster.
        micro_batches: of each step; 0: two more than the pipeline has chunks.

    Raises:
        UserError: what is there (data, tokenizer, checkpoint) does not fit the configuration.
    """
    check_groups(config.model, config.optimizer.groups, config.lora)
    device = start_fake_process_group(rank, world_size)
    ask_for(config.kernels)
    context = create_context(config.parallel, device)
    yield _place(context)
    stream, tokenizer, chat, absent = _open_data(config)
    yield from absent
    source = _source(config)
    new_rows = rows_to_train(config, source, tokenizer, chat)
    recorder = Recorder(group_labels(context))
    without_data = FakeTensorMode(allow_non_fake_inputs=True)
    with without_data, _ReadsOne(), recorder:
        train_module = build_train_module(config, context, new_rows)
        yield _held(train_module, recorder)
        yield _saved(config, train_module)
        yield from _fitting(config, source, train_module, tokenizer)
    own = config.train.global_batch_size // (config.train.micro_batch_size * context.batch.size)
    chunks = config.parallel.pipeline * config.parallel.virtual_stages
    run = min(own, micro_batches or chunks + 2)
    yield _schedule(config, context, run, own)
    loader = make_loader(config, context, stream)
    batch_size = run * config.train.micro_batch_size * context.batch.size
    for step in range(1, STEPS + 1):
        batches = loader.load((step - 1) * batch_size, batch_size, step)
        with without_data, _ReadsOne(), recorder, recorder.section() as trace:
            train_step(train_module, batches, config.optimizer.lr, False, StepTimer(device))
        yield _step(step, trace, recorder)


class _ReadsOne(TorchDispatchMode):
    """Reading a number of a tensor without data (a loss, a norm) gives 1; small tensors with data keep theirs."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "prim":
            return answer(function, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        return function(*args, **kwargs)


def _place(context: ParallelContext) -> str:
    axes = {"stage": context.pp, "tensor rank": context.tp, "data rank": context.batch}
    places = ", ".join(f"{name} {axis.rank} of {axis.size}" for name, axis in axes.items())
    return f"rank {context.world.rank} of {context.world.size}: {places}"


@dataclass(frozen=True)
class _SyntheticStream:
    """Zeros in place of corpora that are not there: as many samples as the run reads."""

    samples: int
    sequence_length: int

    def __len__(self) -> int:
        return self.samples

    def sample(self, index: int) -> Sample:
        assert index < self.samples, f"sample {index} of a stream of {self.samples}"
        return without_borders(np.zeros(self.sequence_length + 1, dtype=np.int64))

    def source(self, index: int) -> Path:
        return Path("synthetic")


def _open_data(config: Config) -> tuple[SampleStream, Tokenizer | None, dict[str, Any] | None, list[str]]:
    """The run's samples, or synthetic ones in their place; tokenizer; template of conversations; and what is absent, in
    words."""
    data, train = config.data, config.train
    sources = [*data.train, *data.valid]
    missing = [source for source in sources if not all(path.is_file() for path in token_paths(Path(source.path)))]
    present = [source for source in sources if source not in missing]
    absent = [f"  absent: {source.path}.bin and .idx" for source in missing]
    override = data.tokenizer
    if override is not None and not all(Path(part).exists() for part in override.split(",")):
        absent.append(f"  absent: tokenizer {override}")
        override = None
    tokenizer = find_tokenizer(present, override, config.model.vocab_size)
    cache = cache_folder(data.cache_dir)
    present_train = [source for source in data.train if source not in missing]
    for split in (present_train, [source for source in data.valid if source not in missing]):
        if split:
            open_split(split, data, train.seed, config.model.vocab_size, cache)
    samples = max(STEPS, train.steps) * train.global_batch_size
    if any(source in missing for source in data.train):
        tokens = samples * data.sequence_length
        absent.append(f"  in their place: {samples:,} synthetic samples, {tokens:,} tokens")
        return _SyntheticStream(samples, data.sequence_length), tokenizer, None, absent
    corpora = open_split(data.train, data, train.seed, config.model.vocab_size, cache)
    return corpora.stream(samples), tokenizer, corpora.chat(), absent


def _held(train_module: TrainModule, recorder: Recorder) -> str:
    layers = [layer for chunk in train_module.chunks for layer in chunk.chunk.layers]  # type: ignore[union-attr]
    parameters = sum(parameter.numel() for parameter in train_module.chunks.parameters())
    owned = sum(item.master.numel() for item in train_module.optimizer.owned)
    return (
        f"  layers {_ranges(layers)}: {parameters:,} parameters, {owned:,} of them in this rank's optimizer, "
        f"{recorder.live / GIB:.2f} GiB"
    )


def _ranges(layers: list[int]) -> str:
    """[0, 1, 2, 6, 7] -> 0-2, 6-7."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return ", ".join(f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


def _saved(config: Config, train_module: TrainModule) -> str:
    """Cuts every entry of a checkpoint as saving does."""
    optimizer = train_module.optimizer
    part: Part = "adapters" if config.lora.rank else "all"
    entries = state_views(state_shards(optimizer, part=part), optimizer, train_module.context)
    size = 0
    for name, entry in entries.items():
        local = entry
        if isinstance(entry, DTensor):
            local = entry.to_local()
            expected, _ = compute_local_shape_and_global_offset(entry.shape, entry.device_mesh, entry.placements)
            assert tuple(local.shape) == tuple(expected), f"{name}: shard {local.shape}, its view wants {expected}"
        size += local.numel() * local.element_size()
    return f"  checkpoint: {len(entries)} entries of this rank, {size / GIB:.2f} GiB"


def _source(config: Config) -> Source | None:
    """The checkpoints that the run would begin with, where they are there."""
    given = [path for path in (config.checkpoint.load, config.lora.base) if path is not None]
    return find_source(config, None) if given and all(Path(path).exists() for path in given) else None


def _fitting(
    config: Config, source: Source | None, train_module: TrainModule, tokenizer: Tokenizer | None
) -> Iterator[str]:
    """Compares every entry with those of the checkpoints to be loaded."""
    if source is None:
        for path in (config.checkpoint.load, config.lora.base):
            if path is not None and not Path(path).exists():
                yield f"  absent: {path}, in its place initial weights, of the same entries"
        return
    parts: list[tuple[Path | None, Part]] = [(source.step, "adapters" if config.lora.rank else "all")]
    if source.base is not None:
        parts.insert(0, (source.base, "base"))
    for folder, part in parts:
        if folder is None:
            continue
        state = read_state(folder)
        check_model(state, config.model, folder)
        check_tokenizer(state, tokenizer.describe() if tokenizer else None, folder)
        shards = state_shards(train_module.optimizer, source.everything and part != "base", part)
        check_shapes(state_views(shards, train_module.optimizer, train_module.context), folder)
        yield f"  {folder} fits"


def _schedule(config: Config, context: ParallelContext, run: int, own: int) -> str:
    schedule: Schedule = GENERATORS[config.parallel.schedule](context.pp.size, run, config.parallel.virtual_stages)
    actions: list[Action] = schedule[context.pp.rank]
    return f"  {config.parallel.schedule}: {run} of {own} micro-batches a step, {len(actions)} passes of this stage"


def _step(step: int, trace: Trace, recorder: Recorder) -> str:
    calls = Counter(event.group for event in trace.collectives)
    sizes: Counter[str] = Counter()
    for event in trace.collectives:
        sizes[event.group] += event.size
    groups = ", ".join(f"{group} {calls[group]:,} ({sizes[group] / 1e6:,.1f} MB)" for group in sorted(calls))
    return f"  step {step}: peak memory {recorder.peak / GIB:.2f} GiB; collectives: {groups or 'none'}"
