"""``sharding: full``: parameters, gradients and optimizer state are cut, with PyTorch's own FSDP2 (``fully_shard``).

Each layer gathers its weights when it computes and reduce-scatters its gradients after its backward pass; with
``parallel.replicate`` the shards are then summed over the replicas (hybrid sharding).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from megatron_med.parallel.context import Axis, ParallelContext
from megatron_med.parallel.data_parallel.base import DataParallel, FrozenShard, ParameterShard
from megatron_med.parallel.parameters import layout_of, parameters_with_layout


class FullyShardedDataParallel(DataParallel):
    """FSDP2 around every layer and every chunk. The fp32 shards are the masters; the model computes in ``dtype``.

    Args:
        chunks: this rank's chunks of the model, with ``layers``; weights initialised.
        context: the grid.
        dtype: of the gathered weights.
    """

    def __init__(self, chunks: nn.ModuleList, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__(context, is_sharded=True)
        self._chunks = chunks
        self._in_pipeline = context.pp.size > 1
        self._mesh = _mesh(context)
        for chunk in chunks:
            self._wrap(chunk, dtype)
        for layout, parameter in parameters_with_layout(chunks):
            local = _local(parameter)
            if layout.trained:
                self.owned.append(ParameterShard(layout, parameter, local, local.new_zeros(0)))
            else:
                self.frozen.append(FrozenShard(layout, local, is_sharded=True))

    def _wrap(self, chunk: nn.Module, dtype: torch.dtype) -> None:
        layouts = {name: layout_of(parameter) for name, parameter in chunk.named_parameters()}
        options: dict[str, Any] = {
            "mesh": self._mesh,
            "shard_placement_fn": lambda parameter: Shard(layout_of(parameter).dp_dim),
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        }
        for part in [*cast(nn.ModuleList, chunk.layers), chunk]:  # one layer at a time is whole in fp32
            for parameter in part.parameters():
                if parameter.dtype != torch.float32 and parameter.requires_grad:
                    parameter.data = parameter.data.float()
            # Micro-batches overlap in a pipeline: gathering again for each of them would cost more than it saves. The
            # chunk's own parameters (embedding, head) are needed again at once.
            fully_shard(part, reshard_after_forward=not self._in_pipeline and part is not chunk, **options)
        for module in _fsdp_modules(chunk):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        for name, parameter in chunk.named_parameters():
            parameter.parallel_layout = layouts[name]  # type: ignore[attr-defined]

    def begin_step(self, micro_batches: int) -> None:
        for item in self.owned:  # the last step's gradients are gone before the new ones come
            item.parameter.grad = None
            item.gradient = item.gradient.new_zeros(0)

    def before_backward(self, chunk: int, is_last: bool) -> None:
        module = cast(FSDPModule, self._chunks[chunk])
        module.set_is_last_backward(is_last)
        module.set_requires_all_reduce(is_last)
        if self._in_pipeline:
            module.set_requires_gradient_sync(is_last)
            module.set_reshard_after_backward(is_last)

    def finish_grad_sync(self) -> None:
        for item in self.owned:
            assert item.parameter.grad is not None, f"{item.layout.name} got no gradient"
            item.gradient = _local(item.parameter.grad)

    def start_param_sync(self) -> None:
        for module in _fsdp_modules(self._chunks):
            module.reshard()  # the next forward pass gathers the new values

    def finish_param_sync(self) -> None:
        """Nothing to wait for: each layer gathers its weights itself."""


def _mesh(context: ParallelContext) -> DeviceMesh:
    """The ranks that cut (and replicate) this stage, as FSDP2 wants to see them."""
    assert context.grid is not None, "full sharding needs a process group"
    ranks = context.grid[context.pp.rank, :, :, :, context.tp.rank].flatten(1)  # [dp_replicate, fsdp]
    if context.dp_replicate.size == 1:
        group = _group(context.fsdp)
        return DeviceMesh.from_group(group, context.device.type, mesh=ranks[0], mesh_dim_names=("fsdp",))
    groups = [_group(context.dp_replicate), _group(context.fsdp)]
    return DeviceMesh.from_group(groups, context.device.type, mesh=ranks, mesh_dim_names=("dp_replicate", "fsdp"))


def _group(axis: Axis) -> dist.ProcessGroup:
    return axis.group or dist.new_group(list(axis.ranks), use_local_synchronization=True)


def _fsdp_modules(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor), "fully_shard makes every parameter a DTensor"
    return tensor.to_local().detach()
