"""The range of every number of a configuration."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_med.config.schema import Config, ModelConfig, OptimizerConfig

DROPOUTS = ("embedding_dropout", "hidden_dropout", "attention_dropout")

_LARGEST_COUNT = 2**31 - 1
_LARGEST = {"model.num_layers": 65536}
_LARGEST_NUMBER = 1.0e30  # fp32 ends at 3.4e38
_MOST_EPOCHS = 1_000_000
_LONGEST_WAIT = 366 * 24 * 60.0


def counts(config: Config) -> Iterator[str]:
    """Counts of which there must be one at least."""
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
        "train.micro_batch_size": train.micro_batch_size,
        "train.global_batch_size": train.global_batch_size,
        "train.valid_samples": train.valid_samples,
        "train.max_skipped_steps": train.max_skipped_steps,
        "recompute_interval": config.recompute_interval,
        "optimizer.loss_scale_window": config.optimizer.loss_scale_window,
        "logging.interval": config.logging.interval,
        "logging.sample_tokens": config.logging.sample_tokens,
    }
    for name, value in values.items():
        if value < 1:
            yield f"{name} is {value}: it must be at least 1."
        elif value > _LARGEST.get(name, _LARGEST_COUNT):
            yield f"{name} is {value}: it must be at most {_LARGEST.get(name, _LARGEST_COUNT)}."


def numbers(config: Config) -> Iterator[str]:
    """Everything else that has a range of its own."""
    optimizer, train = config.optimizer, config.train
    yield from model_numbers(config.model)
    yield from _from_0(config)
    yield from _groups(optimizer)
    for split in ("train", "valid"):
        for source in getattr(config.data, split):
            if not 0 < source.weight <= _LARGEST_NUMBER:
                yield f"data.{split}: the weight of {source.path} is {source.weight}. It must be a number above 0."
            if source.repeat is not None and not 0 < source.repeat <= _MOST_EPOCHS:
                yield (
                    f"data.{split}: repeat of {source.path} is {source.repeat}. It must be a number above 0, and at "
                    f"most {_MOST_EPOCHS}."
                )
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield f"optimizer.betas is {list(optimizer.betas)}: both must lie from 0 up to, not including, 1."
    if not 0 <= train.seed < 2**32:
        yield f"train.seed is {train.seed}: it must lie from 0 to {2**32 - 1}."
    if not 0 < train.timeout_minutes <= _LONGEST_WAIT:
        yield (
            f"train.timeout_minutes is {train.timeout_minutes}: it must be a number above 0, and at most "
            f"{_LONGEST_WAIT:.0f} (a year)."
        )
    if config.lr_schedule.warmup_fraction is not None and not 0 <= config.lr_schedule.warmup_fraction <= 1:
        yield f"lr_schedule.warmup_fraction is {config.lr_schedule.warmup_fraction}: it must lie from 0 to 1."
    if train.epochs is not None and not 0 < train.epochs <= _MOST_EPOCHS:
        yield f"train.epochs is {train.epochs}: it must be a number above 0, and at most {_MOST_EPOCHS}."
    at_least_1_or_null = {
        "data.samples_per_epoch": config.data.samples_per_epoch,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "lr_schedule.decay_steps": config.lr_schedule.decay_steps,
    }
    for name, count in at_least_1_or_null.items():
        if count is not None and not 1 <= count <= _LARGEST_COUNT:
            yield f"{name} is {count}: it must be at least 1 and at most {_LARGEST_COUNT}, or null."


def _from_0(config: Config) -> Iterator[str]:
    optimizer = config.optimizer
    values = {
        "optimizer.lr": optimizer.lr,
        "model.init_std": config.model.init_std,
        "optimizer.eps": optimizer.eps,
        "optimizer.weight_decay": optimizer.weight_decay,
        "optimizer.clip_grad": optimizer.clip_grad,
        "optimizer.initial_loss_scale": optimizer.initial_loss_scale,
        "optimizer.min_loss_scale": optimizer.min_loss_scale,
        "quantize.threshold": config.quantize.threshold,
        "train.steps": config.train.steps,
        "lr_schedule.warmup_steps": config.lr_schedule.warmup_steps,
        "train.valid_interval": config.train.valid_interval,
        "checkpoint.interval": config.checkpoint.interval,
        "checkpoint.keep": config.checkpoint.keep,
        "logging.sample_temperature": config.logging.sample_temperature,
    }
    for name, value in values.items():
        if not 0 <= value <= _LARGEST_NUMBER:
            yield f"{name} is {value}: it must be a number of at least 0, and at most {_LARGEST_NUMBER:g}."


def model_numbers(model: ModelConfig) -> Iterator[str]:
    """Numbers of the model's shape that are no counts."""
    positive: dict[str, float] = {"norm_eps": model.norm_eps, "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        factors = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        positive |= {f"rope_scaling.{name}": getattr(model.rope_scaling, name) for name in factors}
    for name, value in positive.items():
        if not 0 < value <= _LARGEST_NUMBER:
            yield f"model.{name} is {value}: it must be a number above 0, and at most {_LARGEST_NUMBER:g}."
    for name in DROPOUTS:
        value = getattr(model, name)
        if not 0 <= value < 1:
            yield f"model.{name} is {value}: a probability from 0 up to, not including, 1 is needed."


def _groups(optimizer: OptimizerConfig) -> Iterator[str]:
    for group in optimizer.groups:
        decay = group.weight_decay
        if not 0 < group.lr_scale <= _LARGEST_NUMBER or (decay is not None and not 0 <= decay <= _LARGEST_NUMBER):
            yield (
                f"optimizer.groups: {group.match} has lr_scale {group.lr_scale} and weight_decay {decay}. The first "
                "must be above 0, the second at least 0 or null."
            )
