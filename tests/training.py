"""Trains a few steps on test ranks and gathers what comparisons need: losses, norms, first gradients."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_med.checkpoint.folder import CheckpointState, read_state
from megatron_med.checkpoint.load import load_optimizer, verify_checkpoint
from megatron_med.checkpoint.save import save_checkpoint
from megatron_med.checkpoint.storage import Reader
from megatron_med.config.schema import (
    Config,
    DataConfig,
    DataSource,
    LRScheduleConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron_med.config.validate import validate
from megatron_med.data.cache import cache_folder
from megatron_med.data.loader import BatchLoader
from megatron_med.data.streams import open_split
from megatron_med.optim.lr_schedule import learning_rate
from megatron_med.parallel.context import create_context
from megatron_med.tracing.recorder import Recorder, group_labels
from megatron_med.tracing.trace import Trace
from megatron_med.train.setup import build_train_module
from megatron_med.train.step import StepResult, TrainModule, compute_gradients, train_step
from megatron_med.train.timers import StepTimer

STEPS = 20

LLAMA = {
    "family": "llama",
    "num_layers": 5,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 88,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}
GPT2 = {
    "family": "gpt2",
    "num_layers": 5,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}
MODELS = {"llama": LLAMA, "gpt2": GPT2}


@dataclass
class Trained:
    """What a run gave.

    Attributes:
        gradients: of every parameter at step 1, whole, by canonical name.
    """

    losses: list[float]
    norms: list[float]
    gradients: dict[str, np.ndarray]


def make_config(
    prefix: Path,
    model: dict[str, Any],
    *,
    precision: str = "fp32",
    steps: int = STEPS,
    batch: int = 8,
    micro_batch: int | None = None,
    **parallel: Any,
) -> Config:
    """A run of a small model on a token file. Tensor-parallel ranks wait for many small messages: theirs are fewer,
    larger micro-batches."""
    return Config(
        model=ModelConfig(**model),
        data=DataConfig(sequence_length=32, train=[DataSource(str(prefix))]),
        train=TrainConfig(
            steps=steps,
            global_batch_size=batch,
            micro_batch_size=micro_batch or parallel.get("tensor", 1),
            output_dir="unused",
            seed=11,
        ),
        parallel=ParallelConfig(**parallel),
        optimizer=OptimizerConfig(lr=4e-3),
        lr_schedule=LRScheduleConfig(warmup_steps=8, decay_steps=STEPS, min_lr=1e-3),
        precision=precision,  # type: ignore[arg-type]
    )


def set_up(config: Config, new_rows: range | None = None) -> tuple[TrainModule, BatchLoader]:
    """TrainModule and data of this rank; ``new_rows`` is what ``lora.train_rows`` means."""
    faults = validate(config, dist.get_world_size())
    assert not faults, faults
    context = create_context(config.parallel, torch.device("cpu"))
    train_module = build_train_module(config, context, new_rows)
    cache = cache_folder(None)
    seed, length = config.train.seed, config.data.sequence_length
    corpora = open_split(config.data.train, config.data, seed, config.model.vocab_size, cache)
    dataset = corpora.stream(config.train.steps * config.train.global_batch_size)
    loader = BatchLoader(
        dataset,
        context,
        sequence_length=length,
        micro_batch_size=config.train.micro_batch_size,
        vocab_size=config.model.vocab_size,
        seed=seed,
        longest=config.model.max_position_embeddings,
    )
    return train_module, loader


def one_step(train_module: TrainModule, loader: BatchLoader, step: int, size: int = 8, lr: float = 1e-3) -> StepResult:
    """Optimizer step number ``step``, from 1, over the next ``size`` samples."""
    batches = loader.load((step - 1) * size, size, step)
    return train_step(train_module, batches, lr, False, StepTimer(torch.device("cpu")))


class ProductsInFP32(TorchDispatchMode):
    """Computes products and attention of bf16 in fp32 and rounds them: many times as fast where the processor has no
    instructions for bf16. A recorder above it sees the one operation, and none of this memory."""

    _SLOW = (
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    )

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in self._SLOW or args[0].dtype != torch.bfloat16:
            return function(*args, **(kwargs or {}))
        exact = [arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args]
        outputs = function(*exact, **(kwargs or {}))
        if isinstance(outputs, torch.Tensor):
            return outputs.bfloat16()
        # of attention the logarithms of its sums [sample, head, query] are in fp32 anyway
        return tuple(output.bfloat16() if output.dim() == 4 else output for output in outputs)


def recorded_steps(config: Config, steps: int = 2) -> tuple[Recorder, Trace]:
    """Some steps of this rank, its set-up recorded too; the trace is of the last one."""
    recorder = Recorder()
    with recorder:
        train_module, loader = set_up(config)
    recorder._groups.update(group_labels(train_module.context))
    for step in range(1, steps + 1):
        with ProductsInFP32(), recorder, recorder.section() as trace:
            one_step(train_module, loader, step, config.train.global_batch_size)
    return recorder, trace


MEMORY_GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "nothing sharded": (2, {"sharding": "none", "tensor": 2}),
    "optimizer sharded": (4, {"tensor": 2}),
    "two stages": (4, {"pipeline": 2, "layers_per_stage": [2, 3]}),
    "fully sharded": (2, {"sharding": "full"}),
    "fully sharded in a pipeline": (4, {"sharding": "full", "pipeline": 2, "layers_per_stage": [2, 3]}),
}
"""Ranks and cuts on which planned and measured memory are compared."""

WIDE = {"hidden_size": 128, "num_attention_heads": 8, "max_position_embeddings": 256}


def memory_batch(parallel: dict[str, Any]) -> int:
    """Samples of a step whose memory is measured: FSDP2's first micro-batch is unlike the next, which is planned."""
    return 16 if parallel.get("sharding") == "full" else 8


def memory_config(prefix: Path, grid: str, family: str = "llama") -> Config:
    """A run whose tensors are large beside what Python and torch take for themselves."""
    groups = {"num_query_groups": 4, "ffn_hidden_size": 704} if family == "llama" else {}
    model = MODELS[family] | WIDE | groups
    config = make_config(
        prefix,
        model,
        precision="bf16",
        batch=memory_batch(MEMORY_GRIDS[grid][1]),
        micro_batch=2,
        **MEMORY_GRIDS[grid][1],
    )
    config.data.sequence_length = 128
    return config


def measured_peak(config: Config) -> int:
    """Largest memory of this rank, in bytes."""
    recorder, _ = recorded_steps(config)
    return recorder.peak


def train_and_save(
    config: Config, target: Path, source: Path | None, first: int, last: int, head: dict[str, Any] | None = None
) -> list[float]:
    """Loads ``source`` where there is one, trains steps ``first`` to ``last`` at a fixed learning rate and saves."""
    train_module, loader = set_up(config)
    optimizer, context = train_module.optimizer, train_module.context
    if source is not None:
        verify_checkpoint(source, context)
        load_optimizer(source, optimizer, context, moments=True)
        optimizer.resume(read_state(source).optimizer_steps or 0, {})
        train_module.data_parallel.start_param_sync()
    size = config.train.global_batch_size
    losses = []
    for step in range(first, last + 1):
        losses.append(one_step(train_module, loader, step, size).loss)
    state = CheckpointState(
        model=asdict(config.model),
        step=last,
        optimizer_steps=optimizer.steps,
        head=head,
        run={"precision": config.precision},
    )
    save_checkpoint(target, optimizer, context, state=state)
    return losses


def stored_entries(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by name."""
    reader = Reader(folder)
    return {name: reader.read(name) for name in reader.shapes()}


def train_ranks(config: Config) -> tuple[list[float], list[float], list[tuple[str, tuple[int, ...], Any, np.ndarray]]]:
    """Trains on every rank; losses, norms, and this rank's shards of the first step's gradients."""
    return train_from_here(config, *set_up(config))


def train_from_here(
    config: Config, train_module: TrainModule, loader: BatchLoader
) -> tuple[list[float], list[float], list[tuple[str, tuple[int, ...], Any, np.ndarray]]]:
    """The same with what the model holds already."""
    size = config.train.global_batch_size
    compute_gradients(train_module, loader.load(0, size, 1), StepTimer(torch.device("cpu")))
    shards = [_gradient_shard(train_module, item) for item in train_module.optimizer.owned]
    losses, norms = [], []
    for step in range(1, config.train.steps + 1):
        lr = learning_rate(config.lr_schedule, config.optimizer.lr, step, config.train.steps)
        result = one_step(train_module, loader, step, size, lr)
        losses.append(result.loss)
        norms.append(result.gradient_norm)
    return losses, norms, shards


def _gradient_shard(train_module: TrainModule, item: Any) -> tuple[str, tuple[int, ...], Any, np.ndarray]:
    """Name, global shape, where the shard lies (start and stop of each dimension), values."""
    layout, context = item.layout, train_module.context
    where = [[0, size] for size in layout.global_shape]
    if layout.tp_dim is not None:
        length = layout.global_shape[layout.tp_dim] // context.tp.size
        where[layout.tp_dim] = [context.tp.rank * length, (context.tp.rank + 1) * length]
    if item.gradient.shape != item.parameter.shape:
        start, stop = where[layout.dp_dim]
        chunk = -(-(stop - start) // context.fsdp.size)
        begin = min(start + context.fsdp.rank * chunk, stop)
        where[layout.dp_dim] = [begin, min(begin + chunk, stop)]
    return layout.name, layout.global_shape, where, item.gradient.clone().numpy()


def gather(results: list[Any]) -> Trained:
    """Joins what the ranks returned; every copy of a gradient must be equal."""
    losses, norms, _ = results[0]
    gradients: dict[str, np.ndarray] = {}
    for other_losses, other_norms, shards in results:
        assert other_losses == losses, "ranks disagree on the loss"
        assert other_norms == norms, "ranks disagree on the gradient norm"
        for name, shape, where, values in shards:
            whole = gradients.setdefault(name, np.full(shape, np.nan, np.float32))
            region = tuple(slice(start, stop) for start, stop in where)
            if not np.isnan(whole[region]).any():
                np.testing.assert_allclose(whole[region], values, rtol=1e-4, atol=1e-7, err_msg=name)
            whole[region] = values
    assert not any(np.isnan(gradient).any() for gradient in gradients.values()), "a gradient has holes"
    return Trained(losses, norms, gradients)
