"""Builds everything a run needs from its configuration."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from megatron_med.checkpoint.folder import CheckpointState, read_state
from megatron_med.config import Config, dump_config
from megatron_med.config.lora import targets_of
from megatron_med.config.schema import LANGUAGE_MODEL
from megatron_med.data.cache import cache_folder
from megatron_med.data.head_form import check_head, check_same_labels
from megatron_med.data.loader import BatchLoader
from megatron_med.data.sources import find_tokenizer
from megatron_med.data.streams import Corpora, open_split
from megatron_med.errors import ConfigError
from megatron_med.kernels.backend import ask_for
from megatron_med.launch.preflight import preflight
from megatron_med.model.batch import MicroBatch
from megatron_med.model.build import DTYPES, build_chunks
from megatron_med.model.flops import parameter_count
from megatron_med.model.lora import add_adapters
from megatron_med.model.recompute import Recompute
from megatron_med.model.transformer import Transformer
from megatron_med.optim.groups import check_groups, freeze_groups
from megatron_med.optim.loss_scale import LossScaler
from megatron_med.optim.optimizer import Optimizer
from megatron_med.parallel.collectives import gather_objects, on_first_rank
from megatron_med.parallel.context import ParallelContext, create_context
from megatron_med.parallel.data_parallel.base import DataParallel
from megatron_med.parallel.data_parallel.buckets import BucketedDataParallel
from megatron_med.parallel.data_parallel.fully_sharded import FullyShardedDataParallel
from megatron_med.parallel.parameters import initialise
from megatron_med.parallel.pipeline_parallel.engine import PipelineEngine
from megatron_med.tokenizer import Tokenizer
from megatron_med.train.banner import banner
from megatron_med.train.continuity import Settings, beyond_horizon, changes, decay_horizon, settings_of
from megatron_med.train.loading import Progress, choose_source, load_state, rows_to_train
from megatron_med.train.run_folder import RunFolder
from megatron_med.train.samples import SamplePrompts
from megatron_med.train.step import TrainModule


@dataclass
class Run:
    """A run that is ready to train.

    Attributes:
        chat: template of the conversations that the model is trained on, or was.
        head: how the sequences that the model scores were made; None for a language model.
        adapter: what the run's checkpoints say of its adapters, where it trains such.
        new_rows: tokens that were added to the base's vocabulary and are not trained.
        frozen: names of all parameters that are not trained.
        horizon: step at which the decay of the learning rate ends.
        best: lowest validation loss so far and its step.
        samples: prompts that are answered at every validation; None: none are.
    """

    config: Config
    folder: RunFolder
    train_module: TrainModule
    train_data: BatchLoader
    valid_data: BatchLoader | None
    tokenizer: Tokenizer | None
    progress: Progress
    chat: dict[str, Any] | None
    head: dict[str, Any] | None
    adapter: dict[str, Any] | None
    new_rows: list[int] | None
    frozen: list[str]
    horizon: int
    best: dict[str, Any] | None
    samples: SamplePrompts | None = None

    @property
    def context(self) -> ParallelContext:
        return self.train_module.context

    def checkpoint_state(self) -> CheckpointState:
        """What a checkpoint of this moment says of itself."""
        scaler = self.train_module.loss_scaler
        return CheckpointState(
            model=asdict(self.config.model),
            tokenizer=self.tokenizer.describe() if self.tokenizer else None,
            step=self.progress.step,
            consumed_samples=self.progress.consumed_samples,
            optimizer_steps=self.train_module.optimizer.steps,
            initial_lr=self.train_module.optimizer.initial_lr,
            loss_scaler=scaler.state_dict() if scaler is not None else None,
            chat=self.chat,
            head=self.head,
            adapter=self.adapter,
            new_rows=self.new_rows,
            best=self.best,
            frozen=self.frozen,
            moments_since=self.train_module.optimizer.moments_since,
            settings=settings_of(self.config, self.horizon, self.context.device.type),
            run={"precision": self.config.precision, "parallel": asdict(self.config.parallel)},
        )


def set_up(config: Config, folder: RunFolder, device: torch.device) -> Run:
    """Joins the ranks, opens data, builds the model, and loads what it goes on from.

    Raises:
        UserError: data, run folder or checkpoint do not fit the configuration.
    """
    ask_for(config.kernels, device.type)
    context = create_context(config.parallel, device, timedelta(minutes=config.train.timeout_minutes))
    preflight(context)
    on_first_rank(context, folder.claim)
    model, data, train = config.model, config.data, config.train
    cache = cache_folder(data.cache_dir)
    tokenizer = find_tokenizer([*data.train, *data.valid], data.tokenizer, model.vocab_size)
    corpora = open_split(data.train, data, train.seed, model.vocab_size, cache)
    head = corpora.head()
    check_head(config.model, head)
    given, config = config, with_steps(config, corpora)
    identity = _identity(config, corpora)
    on_first_rank(context, lambda: folder.check_identity(identity))
    check_groups(model, config.optimizer.groups, config.lora)

    source = choose_source(config, folder, context)
    if source is not None and source.step is not None:
        check_same_labels(head, read_state(source.step).head, str(source.step))
    new_rows = rows_to_train(config, source, tokenizer, corpora.chat())
    if context.world.is_first:
        print("\n".join(banner(config, context, corpora, source)), flush=True)
    train_module = _built(config, context, new_rows)
    trained, frozen = _gather_names(train_module)
    if config.lora.rank:
        tell_of_adapters(config, train_module)
    loaded = load_state(config, source, train_module, tokenizer, trained, frozen)
    progress, before = loaded.progress, loaded.settings
    chat = corpora.chat() or loaded.chat
    samples = SamplePrompts(config, tokenizer, chat) if config.logging.sample_prompts else None
    horizon = decay_horizon(config, before)
    config = with_warmup(config, horizon)
    on_first_rank(context, lambda: folder.begin(identity, dump_config(given), progress.step))
    if before and context.world.is_first:
        _tell_of_changes(config, before, horizon, progress.step, device)
    for line in corpora.told() if context.world.is_first else ():
        print(line, flush=True)
    tell_of_repetition(config, context, corpora.one_pass())
    remaining = max(0, config.train.steps - progress.step) * train.global_batch_size
    total = max(1, progress.consumed_samples + remaining)
    return Run(
        config=config,
        folder=folder,
        train_module=train_module,
        train_data=make_loader(config, context, corpora.stream(total)),
        valid_data=_validation_data(config, context, cache, head),
        tokenizer=tokenizer,
        progress=progress,
        chat=chat,
        head=head,
        adapter=loaded.adapter,
        new_rows=None if "embedding.word.weight" in trained else loaded.new_rows,
        best=loaded.best,
        samples=samples,
        frozen=sorted(frozen),
        horizon=horizon,
    )


def tell_of_adapters(config: Config, train_module: TrainModule) -> None:
    """What is trained beside how much, on rank 0."""
    data_parallel, context = train_module.data_parallel, train_module.context
    own = sum(item.master.numel() for item in data_parallel.owned if data_parallel.counts_in_norm(item))
    trained, whole = sum(gather_objects(own, context.world)), parameter_count(config.model)
    names = ", ".join(dict.fromkeys(target.name for target in targets_of(config.model, config.lora)))
    if context.world.is_first:
        print(
            f"adapters of rank {config.lora.rank} on {names}: {trained:,} parameters are trained beside {whole:,} "
            f"({100 * trained / whole:.2g} %)",
            flush=True,
        )


def with_steps(config: Config, corpora: Corpora) -> Config:
    """The configuration with the steps that ``train.epochs`` means; the last one is filled up from the next epoch."""
    train = config.train
    if train.epochs is None:
        return config
    samples = corpora.samples_of(train.epochs)
    return replace(config, train=replace(train, steps=max(1, math.ceil(samples / train.global_batch_size))))


def with_warmup(config: Config, horizon: int) -> Config:
    """The configuration with the steps that ``lr_schedule.warmup_fraction`` means."""
    schedule = config.lr_schedule
    if schedule.warmup_fraction is None:
        return config
    return replace(config, lr_schedule=replace(schedule, warmup_steps=round(schedule.warmup_fraction * horizon)))


def _tell_of_changes(config: Config, before: Settings, horizon: int, step: int, device: torch.device) -> None:
    for line in changes(before, settings_of(config, horizon, device.type), step):
        print(line, flush=True)
    warning = beyond_horizon(config, horizon, step)
    if warning:
        print(warning, file=sys.stderr, flush=True)


def tell_of_repetition(config: Config, context: ParallelContext, one_pass: int) -> None:
    """Warns, on rank 0, where some corpus has fewer samples in one pass than a step takes."""
    batch = config.train.global_batch_size
    if context.world.is_first and one_pass < batch:
        print(
            f"warning: a corpus of data.train repeats after {one_pass:,} samples, and a step takes "
            f"train.global_batch_size = {batch:,}: texts come more than once in a step.",
            file=sys.stderr,
            flush=True,
        )


def _built(config: Config, context: ParallelContext, new_rows: range | None) -> TrainModule:
    try:
        return build_train_module(config, context, new_rows)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise ConfigError(
            f"the model does not fit into the memory of a rank ({str(error).splitlines()[0][-90:]}). Cut it over more "
            "ranks (parallel.tensor, parallel.pipeline, parallel.sharding), or make it smaller; megatron-med plan says "
            "what a rank needs."
        ) from error


def build_train_module(config: Config, context: ParallelContext, new_rows: range | None = None) -> TrainModule:
    """Model with initial weights, gradients over the data-parallel ranks, pipeline engine and optimizer.

    ``new_rows`` are the tokens that ``lora.train_rows`` means.
    """
    dtype = DTYPES[config.precision]
    recompute = Recompute(config.recompute, config.recompute_interval)
    chunks = build_chunks(config.model, context, dtype, config.parallel, recompute, config.quantize)
    add_adapters(chunks, config.model, config.lora, new_rows)
    initialise(chunks, context, config.train.seed)
    freeze_groups(chunks, config.optimizer.groups)
    data_parallel = _data_parallel(chunks, context, dtype, config.parallel.sharding)
    engine: PipelineEngine[MicroBatch] = PipelineEngine(
        cast(list[Transformer], list(chunks)), context, dtype, data_parallel.before_backward
    )
    return TrainModule(
        context=context,
        chunks=chunks,
        engine=engine,
        data_parallel=data_parallel,
        optimizer=Optimizer(data_parallel, context, config.optimizer),
        schedule=config.parallel.schedule,
        loss_scaler=LossScaler(config.optimizer) if config.precision == "fp16" else None,
    )


def _gather_names(train_module: TrainModule) -> tuple[set[str], set[str]]:
    """Names of all trained and of all frozen parameters of the model; of adapters without those of their base."""
    optimizer = train_module.optimizer
    adapters = any(item.layout.adapter for item in optimizer.owned)
    frozen_here = [item.layout.name for item in optimizer.frozen if item.layout.adapter or not adapters]
    own = [item.layout.name for item in optimizer.owned], frozen_here
    parts = gather_objects(own, train_module.context.world)
    trained, frozen = ({name for part in parts for name in part[kind]} for kind in (0, 1))
    return trained, frozen


def _data_parallel(chunks: nn.ModuleList, context: ParallelContext, dtype: torch.dtype, sharding: str) -> DataParallel:
    if sharding == "full":
        return FullyShardedDataParallel(chunks, context, dtype)
    return BucketedDataParallel(chunks, context, shard=sharding == "optimizer")


def make_loader(config: Config, context: ParallelContext, dataset: Any) -> BatchLoader:
    """Reads the micro-batches of this rank from a stream of samples."""
    return BatchLoader(
        dataset,
        context,
        sequence_length=config.data.sequence_length,
        micro_batch_size=config.train.micro_batch_size,
        vocab_size=config.model.vocab_size,
        seed=config.train.seed,
        longest=config.model.max_position_embeddings,
    )


def _validation_data(
    config: Config, context: ParallelContext, cache: Path, head: dict[str, Any] | None
) -> BatchLoader | None:
    """The fixed validation samples: ``train.valid_samples``, or fewer where a corpus would repeat."""
    if not config.train.valid_interval:
        return None
    sources, data = config.data.valid, replace(config.data, samples_per_epoch=None)
    corpora = open_split(sources, data, config.train.seed, config.model.vocab_size, cache)
    check_same_labels(head, corpora.head(), "data.valid")
    for line in corpora.told() if context.world.is_first else ():
        print(line, flush=True)
    samples = max(1, min(config.train.valid_samples, corpora.one_pass()))
    return make_loader(config, context, corpora.stream(samples))


def _identity(config: Config, corpora: Corpora) -> dict[str, Any]:
    """What must stay the same for as long as a RUN lives: the model, the data and their order."""
    model = asdict(config.model)
    model.pop("preset")
    if config.model.head == LANGUAGE_MODEL:  # so that runs from before there were others go on
        model.pop("head")
        model.pop("num_labels")
    return {
        "model": model,
        "data": {"sequence_length": config.data.sequence_length, **corpora.identity()},
        "train": {"seed": config.train.seed},
    }
