"""Writes down what code does on tensors, with or without data: kernels, collectives and memory.

Within ``FakeTensorMode`` a ``Recorder`` sees every operation that the real code would run, forward and backward. Over
real tensors it sees the same.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_med.kernels.opaque import NAMESPACE, cost_of
from megatron_med.parallel.context import ParallelContext
from megatron_med.tracing.trace import Collective, Kernel, KernelKind, Trace, Wait

_COLLECTIVES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")


class _RecordedWork(dist._Work):
    """A collective that is under way; its first ``wait`` is recorded."""

    def __init__(self, recorder: Recorder, number: int, work: dist.Work) -> None:
        super().__init__()
        self._recorder = recorder
        self._number = number
        self._work: dist.Work | None = work

    def wait(self, timeout: Any = None) -> bool:
        if self._work is not None:
            self._recorder.trace.events.append(Wait(self._number))
            self._work.wait()
            self._work = None  # it holds the collective's tensors
        return True

    def is_completed(self) -> bool:
        return self._work is None or self._work.is_completed()


def group_labels(context: ParallelContext) -> dict[str, str]:
    """Name of each process group of a context -> its axis."""
    labels: dict[str, str] = {}
    for label, axis in context.axes().items():
        if axis.group is not None:
            labels.setdefault(str(axis.group.group_name), label)
    return labels


def answer(function: Any, args: Any, kwargs: Any) -> Any:
    """A question about a tensor, which costs nothing. Most are for its device, many for each operation: a tensor
    without data answers them at once, not through every mode below this one."""
    if function is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
        return torch.device("meta") if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
    return function(*args, **kwargs)


class Recorder(TorchDispatchMode):
    """Records everything that runs within it.

    Args:
        groups: label of each process group by its name; others keep their name.

    Attributes:
        trace: the current one; ``section`` gives a fresh one.
        live, peak: bytes of all storages made within, now and at most.
    """

    def __init__(self, groups: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._groups = dict(groups or {})
        self._works: list[_RecordedWork] = []  # autograd holds the C++ half only
        self._storages: dict[int, int] = {}  # address of the storage -> its number
        self._sizes: dict[int, int] = {}  # address of the storage -> bytes that count
        self._made = 0
        self.trace = Trace()
        self.live = 0
        self.peak = 0

    @contextmanager
    def section(self) -> Iterator[Trace]:
        """A trace of its own for what runs within; ``peak`` starts again from what is live."""
        outer, self.trace = self.trace, Trace()
        self.peak = self.live
        try:
            yield self.trace
        finally:
            self.trace = outer

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "prim":
            return answer(function, args, kwargs)
        if function.namespace == "c10d":
            return self._communicate(function, args, kwargs)
        if function is torch.ops.aten._fused_sdp_choice.default and isinstance(args[0], FakeTensor):
            return _fused_choice(*args, **kwargs)
        if function.namespace == NAMESPACE:
            return self._run_opaque(function, args)
        out = function(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        known = {self._number(tensor) for tensor in inputs}
        fresh = [self._number(tensor, is_new=True) not in known for tensor in outputs]
        if self._is_free(function, any(fresh)):
            return out
        self._compute(function, inputs, outputs, args)
        return out

    def _run_opaque(self, function: Any, args: Any) -> Any:
        """An operation whose inside is not seen: it tells what it costs."""
        cost = cost_of(function, args)
        inputs = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            self._number(tensor)
        out = function(*args)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        writes = {self._number(tensor, is_new=True): _extent(tensor) for tensor in outputs}
        self.peak = max(self.peak, self.live + cost.workspace)
        reads = {self._number(inputs[0]): cost.bytes - sum(writes.values())}
        self.trace.events.append(Kernel(cost.kind, function._opname, cost.flops, cost.shape, reads, writes))
        return out

    @staticmethod
    def _is_free(function: Any, makes_memory: bool) -> bool:
        """Views and uninitialised memory cost nothing."""
        if function._opname in ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"):
            return True
        return not makes_memory and not function._schema.is_mutable

    def _compute(self, function: Any, inputs: list[Tensor], outputs: list[Tensor], args: Any) -> None:
        name = function._opname
        kind, flops, shape = _arithmetic(name, inputs, args)
        reads = {self._number(tensor): _extent(tensor) for tensor in inputs}
        writes = {self._number(tensor): _extent(tensor) for tensor in outputs}
        if function._schema.is_mutable and name.startswith(("copy_", "fill_", "zero_", "normal_")):
            for target in writes:
                reads.pop(target, None)
        if self._adds_product_to_sum(name, inputs):
            product = self.trace.events.pop()
            assert isinstance(product, Kernel), "the last event was a product"
            kind, flops, shape = product.kind, product.flops, product.shape
            fresh = self._number(inputs[1])
            reads = {**product.reads, **{key: size for key, size in reads.items() if key != fresh}}
            name = "addmm"
        self.trace.events.append(Kernel(kind, name, flops, shape, reads, writes))

    def _adds_product_to_sum(self, name: str, inputs: list[Tensor]) -> bool:
        """CUDA sums a half-precision product straight into fp32, where the CPU adds its result."""
        if name != "add_" or len(inputs) != 2 or inputs[0].dtype != torch.float32 or inputs[1].dtype == torch.float32:
            return False
        last = self.trace.events[-1] if self.trace.events else None
        return isinstance(last, Kernel) and last.kind == "product" and self._number(inputs[1]) in last.writes

    def _communicate(self, function: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._number(tensor)
        group = next(dist.ProcessGroup.unbox(leaf) for leaf in args if isinstance(leaf, torch.ScriptObject))
        number = len(self._works)
        self.trace.events.append(
            Collective(
                number,
                _COLLECTIVES.get(function._opname, function._opname),
                self._groups.get(group.group_name, group.group_name),
                max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0),
                tuple(dist.get_process_group_ranks(group)),
            )
        )
        out = function(*args, **kwargs)
        *tensors_out, boxed = out if isinstance(out, (tuple, list)) else [out]
        work = _RecordedWork(self, number, dist._Work.unbox(boxed))
        self._works.append(work)
        return (*tensors_out, work.boxed()) if tensors_out else work.boxed()

    def _number(self, tensor: Tensor, is_new: bool = False) -> int:
        """Number of a tensor's storage. One that is made within the trace is live until it is freed."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._storages:
            self._made += 1
            self._storages[address] = self._made
            self._resized(address, storage.nbytes() if is_new else 0)
            weakref.finalize(storage, self._freed, address)
        return self._storages[address]

    def _resized(self, address: int, size: int) -> None:
        self.live += size - self._sizes.get(address, 0)
        self._sizes[address] = size
        self.peak = max(self.peak, self.live)

    def _freed(self, address: int) -> None:
        self._resized(address, 0)
        del self._sizes[address]
        self.trace.deaths[self._storages.pop(address)] = len(self.trace.events)

    def __enter__(self) -> Recorder:
        """FSDP2 frees gathered weights by resizing their storage, which no dispatch mode sees."""
        resize = torch.UntypedStorage.resize_

        def seen(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._resized(storage._cdata, storage.nbytes())
            return result

        self._restore = partial(setattr, torch.UntypedStorage, "resize_", resize)
        torch.UntypedStorage.resize_ = seen  # type: ignore[assignment,method-assign]
        return super().__enter__()

    def __exit__(self, *arguments: Any) -> None:
        self._restore()
        super().__exit__(*arguments)


def _fused_choice(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, *_: Any, **__: Any
) -> int:
    """The attention that really runs: asked about tensors without data, torch answers for the meta device."""
    return SDPBackend.MATH.value if dropout else SDPBackend.FLASH_ATTENTION.value


def _extent(tensor: Tensor) -> int:
    """Bytes of a tensor that a kernel touches; an expanded one is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _arithmetic(name: str, inputs: list[Tensor], args: Any) -> tuple[KernelKind, float, tuple[int, int, int, int]]:
    """Kind, floating-point operations and (batch, rows, columns, inner) of an operation."""
    if name in _PRODUCTS:
        left, right = inputs[-2:]
        batch = left.shape[0] if left.dim() == 3 else 1
        rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
        return "product", 2.0 * batch * rows * columns * inner, (batch, rows, columns, inner)
    if name.startswith(("_scaled_dot_product", "_flash_attention", "_efficient_attention")):
        is_backward = "backward" in name
        query, key = (inputs[1], inputs[2]) if is_backward else (inputs[0], inputs[1])
        heads_and_samples = math.prod(query.shape[:-2])
        seq, width, keys = query.shape[-2], query.shape[-1], key.shape[-2]
        causal = 0.5 if any(argument is True for argument in args) else 1.0
        forward = 4.0 * heads_and_samples * seq * keys * width * causal
        shape = (heads_and_samples, seq, keys, width)
        if is_backward:  # five products instead of two (Dao et al. 2022)
            return "attention_backward", 2.5 * forward, shape
        return "attention_forward", forward, shape
    return "elementwise", 0.0, (0, 0, 0, 0)
