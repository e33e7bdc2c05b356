"""Traces of one and two layers, with or without embedding and head, forward and backward.

A chunk of any length is one of these plus equal layers, so a plan takes seconds where running the model takes hours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_med.config import Config, ModelConfig
from megatron_med.config.layers import Chunk
from megatron_med.config.schema import LoRAConfig, OverlapConfig, QuantizeConfig
from megatron_med.kernels.backend import planned_device, serving_on
from megatron_med.launch.fake import start_fake_process_group
from megatron_med.model.batch import MicroBatch, plain_batch
from megatron_med.model.build import DTYPES, FAMILIES
from megatron_med.model.lora import add_adapters
from megatron_med.model.quantize import quantizer
from megatron_med.model.recompute import Recompute
from megatron_med.model.transformer import Transformer
from megatron_med.parallel.context import Axis, ParallelContext
from megatron_med.parallel.data_parallel.buckets import BucketedDataParallel
from megatron_med.parallel.parameters import freeze, parameters_with_layout
from megatron_med.parallel.pipeline_parallel.weight_grad_store import WeightGrad, WeightGradStore
from megatron_med.parallel.tensor_parallel.layers import share_weight_grad_store
from megatron_med.tracing.recorder import Recorder
from megatron_med.tracing.trace import Collective, Trace

_LARGEST_GROUP = 1024
"""GPUs of a node never exceed it, and tensor-parallel groups stay within a node."""


@dataclass(frozen=True)
class LayerShape:
    """All that the trace of some layers depends on.

    ``frozen`` holds names of parameters that are not trained: within a layer without ``layers.N.``, others whole.
    ``needs_input_grad``: something below is trained, or a stage before this one waits for the gradient.
    """

    model: ModelConfig
    lora: LoRAConfig
    quantize: QuantizeConfig
    tensor: int
    sequence_parallel: bool
    overlap_tensor: bool
    precision: str
    sequence_length: int
    micro_batch_size: int
    main_gradients: bool
    splits_backward: bool
    recompute: Recompute
    has_embedding: bool = False
    has_head: bool = False
    layers: int = 1
    frozen: tuple[str, ...] = ()
    needs_input_grad: bool = True

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(repr(self))


@dataclass(frozen=True)
class LayerTrace:
    """One micro-batch through some layers.

    Attributes:
        forward, backward: what runs.
        backward_weight: the weight part, where the backward pass is split.
        kept: bytes that stay between forward and backward, the received hidden states included.
        kept_for_weights: bytes that stay after the input part of a split backward pass.
        forward_excess, backward_excess: bytes above ``kept`` at the peak of each pass.
        hidden_bytes: of the hidden states that travel between stages.
    """

    forward: Trace
    backward: Trace
    backward_weight: Trace | None
    kept: int
    kept_for_weights: int
    forward_excess: int
    backward_excess: int
    hidden_bytes: int

    @property
    def collectives(self) -> list[Collective]:
        """Of all passes."""
        traces = (self.forward, self.backward, self.backward_weight)
        return [event for trace in traces if trace is not None for event in trace.collectives]


def shape_of(config: Config) -> LayerShape:
    """The shape of one layer of a configuration."""
    parallel = config.parallel
    return LayerShape(
        model=config.model,
        lora=config.lora,
        quantize=config.quantize,
        tensor=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor > 1,
        overlap_tensor=parallel.overlap.tensor,
        precision=config.precision,
        sequence_length=config.data.sequence_length,
        micro_batch_size=config.train.micro_batch_size,
        main_gradients=parallel.sharding != "full",
        splits_backward=parallel.schedule == "zero_bubble",
        recompute=Recompute(config.recompute, config.recompute_interval),
    )


@dataclass(frozen=True, eq=False)
class LayerKind:
    """One layer alone and two layers, recomputed or kept; their difference is what a further layer costs."""

    one: LayerTrace
    two: LayerTrace

    def each(self, quantity: Callable[[LayerTrace], float]) -> float:
        """A quantity of one layer."""
        return quantity(self.two) - quantity(self.one)


@dataclass(frozen=True)
class ChunkTrace:
    """One micro-batch through a chunk of layers, put together from traces of few.

    Args:
        ends: one of the chunk's layers with its embedding and head.
        has_head: whether there is one.
        head_kept: bytes that it keeps between its passes.
        base: kind of the layer in ``ends``.
        layers: the kind of each layer, first to last.
    """

    ends: LayerTrace
    has_head: bool
    head_kept: int
    base: LayerKind
    layers: tuple[LayerKind, ...]

    def total(self, quantity: Callable[[LayerTrace], float]) -> float:
        """A quantity that adds up over layers."""
        return quantity(self.ends) + sum(count * kind.each(quantity) for kind, count in self._further.items())

    @cached_property
    def _further(self) -> Counter[LayerKind]:
        """Layers beyond the one in ``ends`` by kind."""
        return Counter(self.layers) - Counter([self.base])

    @cached_property
    def kept(self) -> int:
        """Bytes that stay between the forward and the backward pass."""
        return int(self.total(lambda trace: trace.kept))

    @cached_property
    def kept_for_weights(self) -> int:
        """Bytes that stay after the input part of a split backward pass."""
        return int(self.total(lambda trace: trace.kept_for_weights))

    @cached_property
    def forward_excess(self) -> float:
        """Bytes above what is kept, at the peak of a forward pass. While a layer runs, the head keeps nothing yet."""
        in_layers = max(kind.two.forward_excess for kind in set(self.layers))
        return max(self.ends.forward_excess, in_layers - self.head_kept)

    @cached_property
    def backward_excess(self) -> float:
        """The same of a backward pass, which begins with the head and frees layer after layer."""
        return max(self.ends.backward_excess if self.has_head else 0.0, self.layers_backward_excess)

    @cached_property
    def layers_backward_excess(self) -> float:
        """The same without the head, whose own is freed by then."""
        excess = 0.0
        freed = float(self.head_kept)
        for kind in reversed(self.layers):
            excess = max(excess, kind.two.backward_excess - freed)
            freed += kind.each(lambda trace: trace.kept)
        return excess


def trace_chunk(shape: LayerShape, chunk: Chunk, trained: Mapping[str, bool]) -> ChunkTrace:
    """One micro-batch through ``chunk``.

    Args:
        shape: of one layer.
        chunk: which layers of the model, and whether it has embedding and head.
        trained: canonical name of each parameter -> whether it is trained.
    """
    kinds = []
    # Below the model's first trained parameter nothing is kept and no gradient is computed.
    needs_input_grad = not chunk.is_first or any(trained[name] for name in trained if name.startswith("embedding."))
    for index in chunk.layers:
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): value for name, value in trained.items() if name.startswith(prefix)}
        needs_input_grad = needs_input_grad or any(own.values())
        kind = _of_kind(shape, shape.recompute.whole_layer(index))
        kinds.append(replace(kind, frozen=_frozen(own), needs_input_grad=needs_input_grad))
    ends = _frozen({name: value for name, value in trained.items() if not name.startswith("layers.")})
    return _trace_chunk(tuple(kinds), ends, chunk.is_first, chunk.is_last)


def _frozen(trained: Mapping[str, bool]) -> tuple[str, ...]:
    return tuple(sorted(name for name, value in trained.items() if not value))


@cache
def _trace_chunk(
    kinds: tuple[LayerShape, ...], frozen_ends: tuple[str, ...], has_embedding: bool, has_head: bool
) -> ChunkTrace:
    # Where a frozen layer would cut the head off from what is trained, the layer before the head stands for it.
    base = kinds[0] if kinds[0].needs_input_grad else kinds[-1]
    ends = replace(base, has_embedding=has_embedding, has_head=has_head, frozen=base.frozen + frozen_ends)
    pairs = {kind: LayerKind(trace_layers(kind), trace_layers(replace(kind, layers=2))) for kind in set(kinds)}
    head_kept = trace_layers(replace(ends, has_embedding=False)).kept - pairs[base].one.kept if has_head else 0
    return ChunkTrace(trace_layers(ends), has_head, head_kept, pairs[base], tuple(pairs[kind] for kind in kinds))


def _of_kind(shape: LayerShape, is_recomputed: bool) -> LayerShape:
    """Every layer of a trace is of one kind, so the interval of recomputation falls away."""
    if shape.recompute.mode != "full":
        return shape
    return replace(shape, recompute=Recompute("full" if is_recomputed else "none"))


@contextmanager
def fake_world(device: str = "cuda") -> Iterator[None]:
    """Within, layers can be traced: a world of torch's fake backend, whose collectives move nothing, with the kernels
    that serve on ``device``."""
    start_fake_process_group(0, _LARGEST_GROUP)
    try:
        with serving_on(device):
            yield
    finally:
        dist.destroy_process_group()
        _tensor_group.cache_clear()


def trace_layers(shape: LayerShape) -> LayerTrace:
    """Runs some layers once, on tensors without data."""
    return _trace_layers(shape, planned_device())


@cache
def _trace_layers(shape: LayerShape, device: str | None) -> LayerTrace:
    context = _context(shape)
    groups = {} if context.tp.group is None else {str(context.tp.group.group_name): "tp"}
    dtype = DTYPES[shape.precision]
    with FakeTensorMode(allow_non_fake_inputs=True):
        chunk = Chunk(range(shape.layers), shape.has_embedding, shape.has_head)
        finish = quantizer(shape.model, context, dtype, shape.quantize)
        stage = FAMILIES[shape.model.family](shape.model, context, chunk, dtype, shape.recompute, finish)
        add_adapters([stage], shape.model, shape.lora)
        for layout, parameter in parameters_with_layout(stage):
            if _within_its_layer(layout.name) in shape.frozen:
                freeze(parameter)
        _take_gradients(stage, context, shape.main_gradients)
        batch = _batch(shape)
        with Recorder(groups) as recorder:
            return _record(stage, batch, recorder, shape)


def _within_its_layer(name: str) -> str:
    """``layers.3.mlp.down.weight`` -> ``mlp.down.weight``; names outside of layers as they are."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def _context(shape: LayerShape) -> ParallelContext:
    tp = Axis()
    if shape.tensor > 1:
        tp = Axis(shape.tensor, 0, tuple(range(shape.tensor)), _tensor_group(shape.tensor))
    return ParallelContext(
        device=torch.device("cpu"),
        tp=tp,
        sequence_parallel=shape.sequence_parallel,
        overlap=OverlapConfig(tensor=shape.overlap_tensor),
    )


@cache
def _tensor_group(size: int) -> dist.ProcessGroup:
    assert dist.is_initialized(), "layers are traced within fake_world()"
    return dist.new_group(list(range(size)), backend="fake")


def _take_gradients(stage: Transformer, context: ParallelContext, main_gradients: bool) -> None:
    """Gradients go where the real run has them go: into fp32 buckets, or to FSDP2, which takes each at once."""
    if main_gradients:
        data_parallel = BucketedDataParallel(nn.ModuleList([stage]), context, shard=False)
        data_parallel.begin_step(1)
        return

    def taken(parameter: Tensor) -> None:
        parameter.grad = None

    for layout, parameter in parameters_with_layout(stage):
        if layout.trained:
            parameter.register_post_accumulate_grad_hook(taken)


def _batch(shape: LayerShape) -> MicroBatch:
    """Rows of one document: documents that are kept apart cost at most as much."""
    tokens = torch.zeros(shape.micro_batch_size, shape.sequence_length, dtype=torch.int64)
    return plain_batch(tokens, dropout_key="plan")


def _record(stage: Transformer, batch: MicroBatch, recorder: Recorder, shape: LayerShape) -> LayerTrace:
    """One forward and one backward pass as the pipeline engine runs them."""
    dtype = DTYPES[shape.precision]
    received: Tensor | None = None
    stage.train()
    weight_grads = WeightGradStore()
    share_weight_grad_store(stage.modules(), weight_grads)
    hidden_shape = stage.hidden_shape(batch)
    hidden_bytes = torch.Size(hidden_shape).numel() * dtype.itemsize
    with recorder.section() as forward:
        if not shape.has_embedding:
            received = torch.empty(hidden_shape, dtype=dtype).requires_grad_(shape.needs_input_grad)
        read_out = stage.read_loss(batch, torch.ones(())) if shape.has_head else None
        out = stage(received, batch, read_out=read_out)
        # As in the engine: what was sent is let go of, its place in the autograd graph is enough.
        result: Tensor | GradientEdge | None = None
        if out.requires_grad:
            result = out if shape.has_head else get_gradient_edge(out)
        del out
    # What is alive now stays until the backward pass; the peak above it is the forward pass' own.
    kept = recorder.live
    forward_excess = recorder.peak - kept
    with recorder.section() as backward:
        gradient = torch.ones(()) if shape.has_head else torch.empty(hidden_shape, dtype=dtype)
        deferred: list[WeightGrad] = []
        with weight_grads.defer() if shape.splits_backward else nullcontext(deferred) as deferred:
            if result is not None:
                torch.autograd.backward(result, gradient)
        del result, gradient
    backward_excess = recorder.peak - kept
    kept_for_weights = recorder.live
    backward_weight = None
    if shape.splits_backward:
        # The deferred products release their operands one after the other.
        with recorder.section() as backward_weight, torch.no_grad():
            while deferred:
                deferred.pop(0)()
        backward_excess = max(backward_excess, recorder.peak - kept)
    return LayerTrace(
        forward, backward, backward_weight, kept, kept_for_weights, forward_excess, backward_excess, hidden_bytes
    )
