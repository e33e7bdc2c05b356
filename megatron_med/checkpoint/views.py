"""Local shards seen as the global tensors they are cut from, for saving and loading only."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from megatron_med.kernels.blockwise import blocks_of
from megatron_med.optim.adamw8bit import SIGNED, maxima_name
from megatron_med.optim.optimizer import Optimizer
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import ParameterLayout, parameters_with_layout

Part = Literal["all", "adapters", "base"]
"""Which parameters: adapters, the weights that they stand beside, or both."""


def belongs(layout: ParameterLayout, part: Part) -> bool:
    """Whether a parameter is one of that part."""
    return part == "all" or layout.adapter == (part == "adapters")


class GlobalViews:
    """Makes DTensor views over the (tp, fsdp) ranks of this stage. Data is shared, never copied."""

    def __init__(self, context: ParallelContext, device_type: str | None = None) -> None:
        self._context = context
        self._mesh: DeviceMesh | None = None
        if context.grid is not None and context.tp.size * context.fsdp.size > 1:
            replica = context.grid[context.pp.rank, context.dp_replicate.rank]  # [dp_shard, cp, tp]
            ranks = replica.flatten(0, 1).t().contiguous()  # [tp, fsdp]
            self._mesh = DeviceMesh(
                device_type or context.device.type, ranks, mesh_dim_names=("tp", "fsdp"), _init_backend=False
            )

    def of_parameter(self, local: Tensor, layout: ParameterLayout) -> Tensor:
        """A tensor-parallel shard, whole on every data-parallel rank."""
        return self._view(local, layout, Replicate())

    def of_shard(self, local: Tensor, layout: ParameterLayout, sharded: bool) -> Tensor:
        """A data-parallel shard: the tensor-parallel one cut again along the declared dimension."""
        return self._view(local, layout, Shard(layout.dp_dim) if sharded else Replicate())

    def of_maxima(self, local: Tensor, layout: ParameterLayout, sharded: bool) -> Tensor:
        """The maxima of a slice's blocks as a part of ``[tensor ranks, data ranks, blocks]``, padded with zeros to the
        blocks of the largest slice."""
        context = self._context
        tensor = 1 if layout.tp_dim is None else context.tp.size
        data = context.fsdp.size if sharded else 1
        largest = math.prod(stop - start for start, stop in layout.slice_of((0, tensor), (0, data)))
        blocks = blocks_of(largest)
        local = F.pad(local.detach(), (0, blocks - len(local))).view(1, 1, blocks)
        if self._mesh is None:
            return local
        placements = [Replicate() if tensor == 1 else Shard(0), Shard(1) if sharded else Replicate()]
        shape = torch.Size((tensor, data, blocks))
        return DTensor.from_local(
            local, self._mesh, placements, run_check=False, shape=shape, stride=(data * blocks, blocks, 1)
        )

    def _view(self, local: Tensor, layout: ParameterLayout, over_dp: Placement) -> Tensor:
        local = local.detach()
        if self._mesh is None:
            return local
        over_tp = Replicate() if layout.tp_dim is None else Shard(layout.tp_dim)
        shape = torch.Size(layout.global_shape)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self._mesh, [over_tp, over_dp], run_check=False, shape=shape, stride=stride)


def weight_views(module: nn.Module, context: ParallelContext, part: Part = "all") -> dict[str, Tensor]:
    """A stage's parameters by canonical name."""
    views = GlobalViews(context)
    return {
        layout.name: views.of_parameter(parameter, layout)
        for layout, parameter in parameters_with_layout(module)
        if belongs(layout, part)
    }


def state_shards(optimizer: Optimizer, moments: bool = True, part: Part = "all") -> dict[str, Tensor]:
    """This rank's part of all that training needs, by name: fp32 master weights and frozen weights by canonical name,
    AdamW's moments as ``optimizer.<moment>.<name>``. Memory is shared, never copied.

    Empty shards (a dimension shorter than the ranks) are left out.
    """
    shards = {
        item.layout.name: item.weight for item in optimizer.frozen if item.weight.numel() and belongs(item.layout, part)
    }
    for item in optimizer.owned:
        if item.master.numel() == 0 or not belongs(item.layout, part):
            continue
        shards[item.layout.name] = item.master.detach()
        for moment, tensor in optimizer.states(item).items() if moments else ():
            shards[moment_name(moment, item.layout.name)] = tensor
    return shards


def moment_name(moment: str, parameter: str) -> str:
    """Name of a moment's entry."""
    return f"optimizer.{moment}.{parameter}"


def state_views(shards: dict[str, Tensor], optimizer: Optimizer, context: ParallelContext) -> dict[str, Tensor]:
    """``state_shards``, or copies of them, as global tensors."""
    by_device = {tensor.device.type: GlobalViews(context, tensor.device.type) for tensor in shards.values()}
    layouts = {item.layout.name: (item.layout, item.is_sharded) for item in optimizer.frozen}
    maxima = set()
    for item in optimizer.owned:
        moments = [moment_name(moment, item.layout.name) for moment in SIGNED]
        of_blocks = [moment_name(maxima_name(moment), item.layout.name) for moment in SIGNED]
        maxima.update(of_blocks)
        layouts |= dict.fromkeys([item.layout.name, *moments, *of_blocks], (item.layout, optimizer.is_sharded))
    return {
        name: getattr(by_device[tensor.device.type], "of_maxima" if name in maxima else "of_shard")(
            tensor, *layouts[name]
        )
        for name, tensor in shards.items()
    }
