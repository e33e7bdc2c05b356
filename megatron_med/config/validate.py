"""Rules that a configuration must keep. Every broken one is collected before anything is raised."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_med.config.schema import Config, ModelConfig, ParallelConfig


def validate(config: Config, world_size: int) -> list[str]:
    """All faults of a configuration on ``world_size`` ranks; an empty list where there are none."""
    positive = list(_positive(config))
    if positive:  # the rules below divide by these values
        return positive + list(_not_yet(config))
    return [
        *_not_yet(config),
        *_model(config.model),
        *_tensor_cut(config.model, config.parallel),
        *_pipeline_cut(config.model, config.parallel),
        *_batch(config, world_size),
        *_numbers(config),
    ]


def possible_world_sizes(parallel: ParallelConfig, world_size: int) -> list[int]:
    """The multiples of tensor x pipeline x context around ``world_size``."""
    unit = parallel.tensor * parallel.pipeline * parallel.context
    below = world_size // unit * unit
    return [size for size in (below - unit, below, below + unit, below + 2 * unit) if size > 0]


def _positive(config: Config) -> Iterator[str]:
    model, parallel, train = config.model, config.parallel, config.train
    values = {
        "model.num_layers": model.num_layers,
        "model.hidden_size": model.hidden_size,
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.num_query_groups,
        "model.head_dim": model.head_dim,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.vocab_size": model.vocab_size,
        "model.max_position_embeddings": model.max_position_embeddings,
        "parallel.tensor": parallel.tensor,
        "parallel.pipeline": parallel.pipeline,
        "parallel.virtual_stages": parallel.virtual_stages,
        "parallel.context": parallel.context,
        "parallel.replicate": parallel.replicate,
        "data.sequence_length": config.data.sequence_length,
        "train.steps": train.steps,
        "train.micro_batch_size": train.micro_batch_size,
        "train.global_batch_size": train.global_batch_size,
        "train.valid_samples": train.valid_samples,
        "train.max_skipped_steps": train.max_skipped_steps,
        "logging.interval": config.logging.interval,
    }
    for name, value in values.items():
        if value < 1:
            yield f"{name} is {value}: it must be at least 1."


def _not_yet(config: Config) -> Iterator[str]:
    parallel = config.parallel
    refused = {
        "parallel.schedule": (parallel.schedule, parallel.schedule in ("gpipe", "1f1b"), "gpipe or 1f1b"),
        "parallel.sharding": (parallel.sharding, parallel.sharding != "full", "none or optimizer"),
        "parallel.virtual_stages": (parallel.virtual_stages, parallel.virtual_stages <= 1, "1"),
        "parallel.context": (parallel.context, parallel.context <= 1, "1"),
        "parallel.replicate": (parallel.replicate, parallel.replicate <= 1, "1"),
        "precision": (config.precision, config.precision != "fp16", "bf16 or fp32"),
        "recompute": (config.recompute, config.recompute == "none", "none"),
        "checkpoint.asynchronous": (
            config.checkpoint.asynchronous,
            not config.checkpoint.asynchronous,
            "false",
        ),
        "data.isolate_documents": (
            config.data.isolate_documents,
            not config.data.isolate_documents,
            "false",
        ),
    }
    for name, (value, supported, choice) in refused.items():
        if not supported:
            yield f"{name} is {value}: not yet supported. Set it to {choice}."


def _model(model: ModelConfig) -> Iterator[str]:
    if model.num_attention_heads % model.num_query_groups:
        yield (
            f"model.num_attention_heads is {model.num_attention_heads} and model.num_query_groups "
            f"{model.num_query_groups}: each group must serve equally many heads. Choose a divisor of "
            f"{model.num_attention_heads} for model.num_query_groups."
        )
    if model.family == "llama" and model.head_dim % 2:
        yield (
            f"model.head_dim is {model.head_dim}: rotary positions turn pairs of numbers, so it must be even. "
            "Set model.head_dim, or another model.hidden_size."
        )
    if model.head_dim * model.num_attention_heads != model.hidden_size and model.family == "gpt2":
        yield (
            f"model.hidden_size is {model.hidden_size}, not num_attention_heads x head_dim = "
            f"{model.num_attention_heads} x {model.head_dim}: gpt2 has no other shape. Change one of them."
        )
    scaling = model.rope_scaling
    if model.family == "gpt2" and scaling is not None:
        yield "model.rope_scaling is set: gpt2 has learned positions. Leave it out."
    if not 0 < model.rope_theta < math.inf or (scaling is not None and not 0 < scaling.factor < math.inf):
        yield "model.rope_theta and model.rope_scaling.factor must be numbers above 0."
    dropouts = ("embedding_dropout", "hidden_dropout", "attention_dropout")
    for name in dropouts:
        value = getattr(model, name)
        if not 0 <= value < 1:
            yield f"model.{name} is {value}: a probability from 0 up to, not including, 1 is needed."
        if value and model.family == "llama":
            yield f"model.{name} is {value}: the llama family has no dropout. Set it to 0."


def cut_faults(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """Why a model cannot be cut over these ranks; an empty list where it can."""
    return [*_tensor_cut(model, parallel), *_pipeline_cut(model, parallel)]


def _tensor_cut(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    tensor = parallel.tensor
    cut = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups (key/value heads)": model.num_query_groups,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        f"the vocabulary {model.vocab_size}, padded to": model.padded_vocab_size,
    }
    for name, value in cut.items():
        if value % tensor:
            divisors = [size for size in range(1, 129) if value % size == 0]
            yield (
                f"parallel.tensor is {tensor}: it must divide {name} = {value}. "
                f"These sizes do: {', '.join(map(str, divisors))}."
            )


def _pipeline_cut(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    if parallel.pipeline > model.num_layers:
        yield (
            f"parallel.pipeline is {parallel.pipeline} and model.num_layers {model.num_layers}: every stage "
            f"needs a layer. Use at most {model.num_layers} stages."
        )
    counts = parallel.layers_per_stage
    if counts is None:
        return
    if len(counts) != parallel.pipeline or sum(counts) != model.num_layers or min(counts, default=0) < 1:
        yield (
            f"parallel.layers_per_stage is {counts}: it needs {parallel.pipeline} numbers of at least 1 "
            f"(parallel.pipeline) that add up to {model.num_layers} (model.num_layers). "
            "Leave it out to have the layers split by cost."
        )


def _batch(config: Config, world_size: int) -> Iterator[str]:
    parallel, train, data = config.parallel, config.train, config.data
    unit = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % unit:
        sizes = ", ".join(map(str, possible_world_sizes(parallel, world_size)))
        yield (
            f"The world size is {world_size}: parallel.tensor x parallel.pipeline = {parallel.tensor} x "
            f"{parallel.pipeline} = {unit} must divide it. These world sizes would: {sizes}."
        )
    else:
        dp = world_size // unit
        if train.global_batch_size % (train.micro_batch_size * dp):
            multiple = train.micro_batch_size * dp
            below = train.global_batch_size // multiple * multiple
            nearest = " or ".join(str(size) for size in (below, below + multiple) if size)
            yield (
                f"train.global_batch_size is {train.global_batch_size}: it must be a multiple of "
                f"train.micro_batch_size x data-parallel size = {train.micro_batch_size} x {dp} = {multiple}. "
                f"Use {nearest}."
            )
    if data.sequence_length > config.model.max_position_embeddings:
        yield (
            f"data.sequence_length is {data.sequence_length}: the model ends at "
            f"model.max_position_embeddings = {config.model.max_position_embeddings}. Raise the latter or "
            "shorten the samples."
        )
    if parallel.sequence_parallel and data.sequence_length % parallel.tensor:
        yield (
            f"data.sequence_length is {data.sequence_length}: sequence parallelism cuts it into "
            f"parallel.tensor = {parallel.tensor} equal parts. Use a multiple, or "
            "parallel.sequence_parallel: false."
        )


def _numbers(config: Config) -> Iterator[str]:
    schedule, optimizer, train = config.lr_schedule, config.optimizer, config.train
    if not config.data.train:
        yield "data.train is empty: name at least one corpus, as [{path: PREFIX}]."
    for split in ("train", "valid"):
        for source in getattr(config.data, split):
            if not 0 < source.weight < math.inf:
                yield f"data.{split}: the weight of {source.path} is {source.weight}. It must be a number above 0."
    decay = schedule.decay_steps if schedule.decay_steps is not None else train.steps
    if schedule.warmup_steps < 0 or (schedule.name != "constant" and schedule.warmup_steps > decay):
        yield (
            f"lr_schedule.warmup_steps is {schedule.warmup_steps}: it must lie between 0 and the end of the decay, "
            f"step {decay}. Shorten the warm-up or set lr_schedule.decay_steps."
        )
    if not 0 <= schedule.min_lr <= optimizer.lr:
        yield f"lr_schedule.min_lr is {schedule.min_lr}: it must lie between 0 and optimizer.lr = {optimizer.lr}."
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield f"optimizer.betas is {list(optimizer.betas)}: both must lie from 0 up to, not including, 1."
    if not 0 <= train.seed < 2**32:
        yield f"train.seed is {train.seed}: it must lie from 0 to {2**32 - 1}."
    limits = {
        "optimizer.lr": optimizer.lr,
        "model.init_std": config.model.init_std,
        "optimizer.eps": optimizer.eps,
        "optimizer.weight_decay": optimizer.weight_decay,
        "optimizer.clip_grad": optimizer.clip_grad,
        "train.valid_interval": train.valid_interval,
        "checkpoint.interval": config.checkpoint.interval,
        "checkpoint.keep": config.checkpoint.keep,
    }
    for name, value in limits.items():
        if not 0 <= value < math.inf:
            yield f"{name} is {value}: it must be a number of at least 0."
    if train.valid_interval and not config.data.valid:
        yield (
            f"train.valid_interval is {train.valid_interval} but data.valid is empty: name a validation corpus, "
            "or set the interval to 0."
        )
    if config.checkpoint.keep_every is not None and config.checkpoint.keep_every < 1:
        yield f"checkpoint.keep_every is {config.checkpoint.keep_every}: it must be at least 1, or null."
