"""What a parameter declares of itself, and its topology-independent initialisation.

A tensor-parallel shard is always one contiguous slice of the global tensor, so any topology can cut it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from megatron_med.parallel.context import Axis, ParallelContext
from megatron_med.parallel.random import generator_of


@dataclass(frozen=True)
class ParameterLayout:
    """Where a parameter comes from and how it is cut.

    Attributes:
        global_shape: shape of the uncut tensor.
        tp_dim: dimension that tensor-parallel ranks cut evenly; None where each holds it all.
        dp_dim: dimension that the sharded optimizer cuts, of the tensor-parallel shard.
        parts: named parts as row indices into the global tensor seen as ``[rows, columns]``.
        partial_over_tp: each tensor-parallel rank computes only a part of the gradient's sum.
        shared: the first and last stage each hold a copy (tied embeddings).
        grad_contributions: contributions to its gradient in one backward pass; 2 where one stage holds embedding and
            tied head.
        trained: whether the optimizer changes it.
        adapter: it stands beside the weights of a base and is saved without them.
        weight_decay: whether weight decay applies.
        lr_scale: factor of the learning rate.
        init: normal or uniform (mean 0, ``init_std``), ones or zeros.
        name: canonical name, equal under every topology: ``layers.12.attention.qkv.weight``. It is the parameter's path
            in the whole model, and given by ``name_parameters``.
    """

    global_shape: tuple[int, ...]
    tp_dim: int | None = None
    dp_dim: int = 0
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    partial_over_tp: bool = False
    shared: bool = False
    grad_contributions: int = 1
    trained: bool = True
    adapter: bool = False
    weight_decay: bool = True
    lr_scale: float = 1.0
    init: Literal["normal", "uniform", "ones", "zeros"] = "normal"
    init_std: float = 0.02
    name: str = ""

    def local_shape(self, tp: Axis) -> tuple[int, ...]:
        """Shape of one tensor-parallel shard."""
        shape = list(self.global_shape)
        if self.tp_dim is not None:
            shape[self.tp_dim] //= tp.size
        return tuple(shape)

    def slice_of(self, tensor: tuple[int, int], data: tuple[int, int]) -> list[tuple[int, int]]:
        """Start and stop, in each dimension of the global tensor, of one slice.

        Args:
            tensor, data: index and number of the ranks that cut it; data-parallel ones as ``torch.chunk`` does.
        """
        box = [(0, size) for size in self.global_shape]
        if self.tp_dim is not None:
            length = self.global_shape[self.tp_dim] // tensor[1]
            box[self.tp_dim] = (tensor[0] * length, (tensor[0] + 1) * length)
        start, stop = box[self.dp_dim]
        chunk = -(-(stop - start) // data[1])
        begin = min(start + data[0] * chunk, stop)
        box[self.dp_dim] = (begin, min(begin + chunk, stop))
        return box

    def cut(self, tensor: Tensor, tp: Axis) -> Tensor:
        """This tensor-parallel rank's shard of the global tensor."""
        if self.tp_dim is None:
            return tensor
        return tensor.chunk(tp.size, self.tp_dim)[tp.rank]


@dataclass(frozen=True)
class RowBlocks:
    """Rows of a named part: of every ``stride`` rows of the weight the ``length`` ones from ``start``."""

    start: int
    length: int
    stride: int

    def count(self, total: int) -> int:
        """How many they are among ``total`` rows."""
        return total // self.stride * self.length

    def rows(self, total: int) -> Tensor:
        """Their indices among ``total`` rows."""
        return self.of(torch.arange(total)).flatten().clone()  # else a part of one block would hold all numbers

    def of(self, tensor: Tensor) -> Tensor:
        """Their place in the last dimension: ``[..., total] -> [..., total / stride, length]``, a view."""
        return tensor.unflatten(-1, (-1, self.stride)).narrow(-1, self.start, self.length)

    def cut(self, tp: Axis) -> RowBlocks:
        """The same of a tensor-parallel shard that takes a slice of every block."""
        return RowBlocks(self.start // tp.size, self.length // tp.size, self.stride // tp.size)


def make_parameter(layout: ParameterLayout, context: ParallelContext, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter that knows its layout."""
    local = torch.empty(layout.local_shape(context.tp), dtype=dtype, device=context.device)
    parameter = nn.Parameter(local, requires_grad=layout.trained)
    parameter.parallel_layout = layout  # type: ignore[attr-defined]
    return parameter


@dataclass(frozen=True)
class MainGrad:
    """Where the products of a backward pass leave a parameter's gradient, past autograd.

    Attributes:
        total: fp32 sum over the micro-batches, shaped like the parameter.
        register_grad_ready: to be called once for every contribution.
    """

    total: Tensor
    register_grad_ready: Callable[[], None]


def main_grad_of(parameter: Tensor) -> MainGrad | None:
    """The main gradient of a parameter; None where its gradient goes through autograd."""
    return getattr(parameter, "main_grad", None)


def layout_of(parameter: Tensor) -> ParameterLayout:
    """The layout a parameter was made with."""
    return cast(ParameterLayout, parameter.parallel_layout)  # type: ignore[attr-defined]


def parameters_with_layout(module: nn.Module) -> Iterator[tuple[ParameterLayout, nn.Parameter]]:
    """Every parameter of a stage with its layout, each once."""
    for parameter in module.parameters():
        yield layout_of(parameter), parameter


def freeze(parameter: nn.Parameter) -> None:
    """Takes a parameter out of training: no gradient, no master weights, no moments."""
    parameter.requires_grad_(False)
    parameter.parallel_layout = replace(layout_of(parameter), trained=False)  # type: ignore[attr-defined]


def name_parameters(module: nn.Module, layers: Sequence[int] = ()) -> None:
    """Gives every parameter its canonical name: its path in the module, which is nested as the names are.

    Args:
        module: a chunk of a model.
        layers: global indices of its ``layers``, which count from 0 in every chunk.
    """
    for path, parameter in module.named_parameters():  # a tied weight once, under the first of its paths
        words = path.split(".")
        if words[0] == "layers":
            words[1] = str(layers[int(words[1])])
        parameter.parallel_layout = replace(layout_of(parameter), name=".".join(words))  # type: ignore[attr-defined]


@torch.no_grad()
def initialise(module: nn.Module, context: ParallelContext, seed: int) -> None:
    """Draws every parameter from a generator of (seed, canonical name), whole and in fp32, then cuts it.

    One rank and a TP x PP x DP grid therefore start from equal weights.
    """
    for layout, parameter in parameters_with_layout(module):
        assert layout.name, "name_parameters comes first: the seed follows from the name"
        if layout.init == "ones":
            parameter.fill_(1)
        elif layout.init == "zeros":
            parameter.zero_()
        else:
            generator = generator_of(seed, layout.name)
            whole = torch.empty(layout.global_shape)
            if layout.init == "uniform":
                bound = math.sqrt(3) * layout.init_std
                whole.uniform_(-bound, bound, generator=generator)
            else:
                whole.normal_(std=layout.init_std, generator=generator)
            parameter.copy_(layout.cut(whole, context.tp))
