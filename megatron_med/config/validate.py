"""Rules that a configuration must keep. Every broken one is collected before anything is raised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_med.config.lora import lora_faults
from megatron_med.config.quantize import quantize_faults
from megatron_med.config.ranges import DROPOUTS, counts, numbers
from megatron_med.config.schema import (
    CLASSIFICATION,
    LANGUAGE_MODEL,
    MOST_CLASSES,
    MULTIPLE_CHOICE,
    Config,
    LRScheduleConfig,
    ModelConfig,
    ParallelConfig,
)
from megatron_med.files import RUN_IDENTITY


def validate(config: Config, world_size: int) -> list[str]:
    """All faults of a configuration on ``world_size`` ranks; an empty list where there are none."""
    broken_counts = list(counts(config))
    if broken_counts:  # the rules below divide by these values
        return broken_counts + list(_not_yet(config))
    return [
        *_not_yet(config),
        *_model(config.model),
        *_tensor_cut(config.model, config.parallel),
        *_pipeline_cut(config.model, config.parallel),
        *_schedule(config.parallel),
        *lora_faults(config),
        *quantize_faults(config),
        *_batch(config, world_size),
        *_sharding(config, world_size),
        *numbers(config),
        *_run(config),
    ]


def warmup_faults(schedule: LRScheduleConfig, horizon: int) -> Iterator[str]:
    """Whether the warm-up is longer than the decay, which ends at step ``horizon``."""
    if schedule.name != "constant" and schedule.warmup_steps > horizon:
        yield (
            f"lr_schedule.warmup_steps is {schedule.warmup_steps}: it must lie between 0 and the end of the decay, "
            f"step {horizon}. Shorten the warm-up or set lr_schedule.decay_steps."
        )


def possible_world_sizes(parallel: ParallelConfig, world_size: int) -> list[int]:
    """The multiples of tensor x pipeline x context around ``world_size``."""
    unit = parallel.model_ranks
    below = world_size // unit * unit
    return [size for size in (below - unit, below, below + unit, below + 2 * unit) if size > 0]


def _not_yet(config: Config) -> Iterator[str]:
    if config.parallel.context > 1:
        yield f"parallel.context is {config.parallel.context}: not yet supported. Set it to 1."


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
    if model.head == CLASSIFICATION and not 2 <= model.num_labels <= MOST_CLASSES:
        yield f"model.num_labels is {model.num_labels}: a classification has 2 to {MOST_CLASSES}. Set it."
    if model.head == MULTIPLE_CHOICE and model.num_labels != 1:
        yield f"model.num_labels is {model.num_labels}: multiple_choice scores options one by one. Leave it out."
    if model.head == LANGUAGE_MODEL and model.num_labels:
        yield f"model.num_labels is {model.num_labels}: a language model has none. Set model.head, or leave it out."
    scaling = model.rope_scaling
    if model.family == "gpt2" and scaling is not None:
        yield "model.rope_scaling is set: gpt2 has learned positions. Leave it out."
    if scaling is not None and scaling.type == "llama3" and not scaling.low_freq_factor < scaling.high_freq_factor:
        yield (
            f"model.rope_scaling.low_freq_factor is {scaling.low_freq_factor}: it must be below high_freq_factor = "
            f"{scaling.high_freq_factor}."
        )
    for name in DROPOUTS:
        value = getattr(model, name)
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
    chunks = parallel.pipeline * parallel.virtual_stages
    product = "parallel.pipeline" if parallel.virtual_stages == 1 else "parallel.pipeline x parallel.virtual_stages"
    if chunks > model.num_layers:
        yield (
            f"{product} is {chunks} and model.num_layers {model.num_layers}: every stage needs a layer. "
            f"Use at most {model.num_layers} stages."
        )
    counts = parallel.layers_per_stage
    if counts is None:
        return
    if len(counts) != chunks or sum(counts) != model.num_layers or min(counts, default=0) < 1:
        yield (
            f"parallel.layers_per_stage is {counts}: it needs {chunks} numbers of at least 1 "
            f"({product}) that add up to {model.num_layers} (model.num_layers). "
            "Leave it out to have the layers split by cost."
        )


def _schedule(parallel: ParallelConfig) -> Iterator[str]:
    virtual, name = parallel.virtual_stages, parallel.schedule
    if name == "interleaved" and (virtual < 2 or parallel.pipeline < 2):
        yield (
            f"parallel.schedule is interleaved with parallel.virtual_stages = {virtual} and parallel.pipeline = "
            f"{parallel.pipeline}: it needs 2 or more of both. Set them, or take 1f1b."
        )
    elif virtual > 1 and name != "interleaved" and (name != "gpipe" or parallel.pipeline < 2):
        yield (
            f"parallel.virtual_stages is {virtual} with parallel.schedule {name} and parallel.pipeline = "
            f"{parallel.pipeline}: several chunks of layers a stage need interleaved (or gpipe) and 2 or more stages. "
            "Set virtual_stages to 1, or the schedule to interleaved."
        )


def _sharding(config: Config, world_size: int) -> Iterator[str]:
    parallel, model = config.parallel, config.model
    if parallel.replicate > 1 and parallel.sharding == "none":
        yield (
            f"parallel.replicate is {parallel.replicate}: with parallel.sharding none every data-parallel rank is a "
            "replica already. Set replicate to 1, or sharding to optimizer or full."
        )
    if world_size % parallel.model_ranks:
        return  # told with the batch
    dp = parallel.data_size(world_size)
    if dp % parallel.replicate:
        divisors = [size for size in range(1, dp + 1) if dp % size == 0]
        yield (
            f"parallel.replicate is {parallel.replicate}: it must divide the data-parallel size {dp}. "
            f"These would: {', '.join(map(str, divisors))}."
        )
        return
    if parallel.sharding != "full":
        return
    if not (parallel.overlap.gradient_reduce and parallel.overlap.weight_gather):
        yield (
            "parallel.overlap.gradient_reduce and weight_gather are for parallel.sharding none and optimizer: FSDP2 "
            "always overlaps. Leave them on, or take another sharding."
        )
    if parallel.schedule == "zero_bubble":
        yield (
            "parallel.schedule is zero_bubble with parallel.sharding full: FSDP2 reduces gradients when a whole "
            "backward pass ends, so they cannot be split. Take 1f1b or interleaved, or sharding optimizer."
        )
    shards = dp // parallel.replicate
    width = model.ffn_hidden_size // parallel.tensor
    if model.family == "llama" and width % shards:
        yield (
            f"parallel.sharding is full over {shards} ranks: they must divide model.ffn_hidden_size / "
            f"parallel.tensor = {width}. Change parallel.replicate or parallel.tensor, or take sharding optimizer."
        )


def _batch(config: Config, world_size: int) -> Iterator[str]:
    parallel, train, data = config.parallel, config.train, config.data
    unit = parallel.model_ranks
    if world_size % unit:
        sizes = ", ".join(map(str, possible_world_sizes(parallel, world_size)))
        yield (
            f"The world size is {world_size}: parallel.tensor x parallel.pipeline = {parallel.tensor} x "
            f"{parallel.pipeline} = {unit} must divide it. These world sizes would: {sizes}."
        )
    else:
        dp = parallel.data_size(world_size)
        if train.global_batch_size % (train.micro_batch_size * dp):
            multiple = train.micro_batch_size * dp
            below = train.global_batch_size // multiple * multiple
            nearest = " or ".join(str(size) for size in (below, below + multiple) if size)
            yield (
                f"train.global_batch_size is {train.global_batch_size}: it must be a multiple of "
                f"train.micro_batch_size x data-parallel size = {train.micro_batch_size} x {dp} = {multiple}. "
                f"Use {nearest}."
            )
    is_written = config.model.head == LANGUAGE_MODEL  # sequences that are scored lie side by side in a sample
    if is_written and data.sequence_length > config.model.max_position_embeddings:
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


def _length(config: Config) -> Iterator[str]:
    """How long the run is, and what depends on it."""
    train, schedule, data = config.train, config.lr_schedule, config.data
    if train.steps and train.epochs is not None:
        yield f"train.steps is {train.steps} and train.epochs {train.epochs}: give one of them."
    if not train.steps and train.epochs is None:
        yield "train.steps is 0: it must be at least 1, or train.epochs be set."
    if schedule.warmup_steps and schedule.warmup_fraction is not None:
        yield (
            f"lr_schedule.warmup_steps is {schedule.warmup_steps} and warmup_fraction {schedule.warmup_fraction}: give "
            "one of them."
        )
    for split in ("train", "valid"):
        sources = getattr(data, split)
        if any(source.repeat is not None for source in sources) and any(source.weight != 1 for source in sources):
            yield f"data.{split} has both weight and repeat: mix corpora by one of them."
    if config.checkpoint.keep_best is not None and not train.valid_interval:
        yield f"checkpoint.keep_best is {config.checkpoint.keep_best}: it needs train.valid_interval and data.valid."


def _run(config: Config) -> Iterator[str]:
    schedule, optimizer, train = config.lr_schedule, config.optimizer, config.train
    if not train.output_dir:
        yield "train.output_dir is empty: name a folder for the run."
    if not config.data.train:
        yield "data.train is empty: name at least one corpus, as [{path: PREFIX}]."
    yield from _length(config)
    is_first_start = not (Path(train.output_dir) / RUN_IDENTITY).is_file()
    is_known = schedule.decay_steps is not None or (is_first_start and train.epochs is None)
    if is_known:  # else its checkpoint, or the data, tell where the decay ends
        yield from warmup_faults(schedule, schedule.decay_steps or train.steps)
    if not 0 <= schedule.min_lr <= optimizer.lr:
        yield f"lr_schedule.min_lr is {schedule.min_lr}: it must lie between 0 and optimizer.lr = {optimizer.lr}."
    for group in optimizer.groups:
        if group.frozen and (group.lr_scale != 1 or group.weight_decay is not None):
            yield (
                f"optimizer.groups: {group.match} is frozen and has lr_scale {group.lr_scale} and weight_decay "
                f"{group.weight_decay}: nothing is updated there. Leave them out, or frozen."
            )
    if optimizer.name == "decoupled_adamw" and optimizer.lr == 0:
        yield "optimizer.lr is 0: decoupled_adamw divides by it. Set a learning rate above 0."
    if config.precision == "fp16" and not 0 < optimizer.min_loss_scale <= optimizer.initial_loss_scale:
        yield (
            f"optimizer.min_loss_scale is {optimizer.min_loss_scale}: it must be above 0 and at most "
            f"optimizer.initial_loss_scale = {optimizer.initial_loss_scale}."
        )
    if config.recompute_interval > 1 and config.recompute != "full":
        yield (
            f"recompute_interval is {config.recompute_interval} and recompute {config.recompute}: only full counts "
            "layers. Set recompute to full, or the interval to 1."
        )
    if config.logging.sample_prompts and not train.valid_interval:
        yield (
            "logging.sample_prompts are given and train.valid_interval is 0: they are answered at every validation. "
            "Set the interval, or leave them out."
        )
    if train.valid_interval and not config.data.valid:
        yield (
            f"train.valid_interval is {train.valid_interval} but data.valid is empty: name a validation corpus, "
            "or set the interval to 0."
        )
