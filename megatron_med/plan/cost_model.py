"""Seconds on an accelerator: of every kernel by what bounds it, of every collective, and of a trace of both. No torch
here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_med.plan.cluster import Cluster
from megatron_med.tracing.trace import Collective, Event, Kernel, Trace, Wait


@dataclass(frozen=True)
class KernelAssumptions:
    """How the software of a run is implemented; a prediction takes it as given.

    Attributes:
        elementwise: separate, every operation is a kernel that reads and writes memory; fused, neighbouring ones
            are one kernel and what dies between them stays on the chip.
        attention: flash2 or flash1 (Dao 2022, 2023); scores, two products and a fused softmax with all scores in
            memory (Megatron-LM of 2021).
        messages: asynchronous, as this project sends them; blocking, both stages stand still (Megatron-LM).
    """

    elementwise: Literal["separate", "fused"] = "separate"
    attention: Literal["flash2", "flash1", "scores"] = "flash2"
    messages: Literal["asynchronous", "blocking"] = "asynchronous"


class CostModel:
    """What things cost on a cluster, in seconds.

    Args:
        cluster: where they run.
        kernels: how they are implemented.
        itemsize: bytes of an element of the activations.
    """

    def __init__(self, cluster: Cluster, kernels: KernelAssumptions, itemsize: int) -> None:
        self.cluster = cluster
        self.kernels = kernels
        self._itemsize = itemsize
        self._known: dict[tuple[Trace, tuple[float, float], bool], float] = {}

    def trace_seconds(
        self, trace: Trace | None, tensor_ranks: tuple[int, ...], free_collectives: bool = False
    ) -> float:
        """Seconds from the first event of layers to the end of their last kernel and collective, computed once for each
        trace.

        Args:
            trace: None: nothing runs.
            tensor_ranks: of the tp group, the only one that layers talk to; the trace was taken on others.
            free_collectives: collectives take no time.
        """
        if trace is None:
            return 0.0
        key = trace, self.cluster.bandwidth(tensor_ranks), free_collectives
        if key not in self._known:
            self._known[key] = self._run(trace, tensor_ranks, free_collectives)
        return self._known[key]

    def _run(self, trace: Trace, tensor_ranks: tuple[int, ...], free_collectives: bool) -> float:
        """Two streams: kernels follow each other, and so do collectives."""
        clock = idle_from = 0.0  # ends of the last kernel and of the last collective
        ends: dict[int, float] = {}  # collective -> its end
        for event in self._launches(trace):
            if isinstance(event, Wait):
                clock = max(clock, ends[event.number])
            elif isinstance(event, Collective):
                assert event.group == "tp", f"layers talk to {event.group}"
                took = 0.0
                if not free_collectives:
                    took = self.transfer_seconds(event.operation, event.size, tensor_ranks)
                ends[event.number] = idle_from = max(clock, idle_from) + took
            else:
                clock = self.overlapped(clock, self.kernel_seconds(event), idle_from)
        return max([clock, *ends.values()])

    def overlapped(self, clock: float, seconds: float, busy_until: float) -> float:
        """End of computation that begins at ``clock`` and shares the device with collectives until ``busy_until``."""
        kind = self.cluster.accelerator
        rate = 1 - kind.collective_multiprocessors / kind.multiprocessors
        shared = max(0.0, busy_until - clock)
        if seconds <= shared * rate:
            return clock + seconds / rate
        return clock + shared + (seconds - shared * rate)

    def kernel_seconds(self, kernel: Kernel) -> float:
        """Seconds of one kernel that has the device for itself."""
        kind = self.cluster.accelerator
        moved = sum(kernel.reads.values()) + sum(kernel.writes.values())
        seconds = self.memory_seconds(moved)
        if kernel.kind == "product":
            batch, rows, columns, _ = kernel.shape
            efficiency = kind.product_efficiency(rows, columns, batch)
            seconds = max(seconds, kernel.flops / (kind.peak_flops * efficiency))
        elif kernel.kind == "opaque":
            seconds = max(seconds, kernel.flops / kind.peak_flops)
        elif kernel.kind != "elementwise":
            if self.kernels.attention == "scores":
                return self._scores(kernel)
            seconds = max(seconds, kernel.flops / (kind.peak_flops * self._attention_share(kernel)))
        return seconds + kind.kernel_seconds

    def memory_seconds(self, moved: float) -> float:
        """Seconds to move so many bytes through the device memory."""
        kind = self.cluster.accelerator
        return moved / (kind.memory_bandwidth * kind.memory_share)

    def transfer_seconds(self, operation: str, size: float, ranks: tuple[int, ...]) -> float:
        """Seconds of a collective over ``ranks`` that has its links for itself, in a ring; of a message between two of
        them."""
        if len(ranks) < 2:
            return 0.0
        bandwidth, latency = self.cluster.bandwidth(ranks)
        hops = wire_hops(operation, len(ranks))
        return hops * latency + wire_bytes(operation, size, len(ranks)) / bandwidth

    def _attention_share(self, kernel: Kernel) -> float:
        kind, first = self.cluster.accelerator, self.kernels.attention == "flash1"
        if kernel.kind == "attention_forward":
            return kind.attention1_forward if first else kind.attention_forward
        return kind.attention1_backward if first else kind.attention_backward

    def _scores(self, kernel: Kernel) -> float:
        """Attention with its scores in memory: batched products over all pairs, then softmax and dropout kernels."""
        kind = self.cluster.accelerator
        heads, seq, keys, width = kernel.shape
        scores = float(heads * seq * keys)
        operands = heads * (seq + keys) * width
        product_bytes = self._itemsize * (scores + operands)
        efficiency = kind.product_efficiency(seq, keys, heads)
        product = max(2 * scores * width / (kind.peak_flops * efficiency), self.memory_seconds(product_bytes))
        is_forward = kernel.kind == "attention_forward"
        # forward: softmax reads and writes, dropout reads and writes; backward: the same and the softmax read again
        passes = 4 if is_forward else 5
        softmax = self.memory_seconds((passes * self._itemsize + 1) * scores)
        return (2 if is_forward else 4) * (product + kind.kernel_seconds) + softmax + 2 * kind.kernel_seconds

    def _launches(self, trace: Trace) -> Iterable[Event]:
        """The events, runs of element-wise kernels as one where the software fuses them."""
        if self.kernels.elementwise == "separate":
            yield from trace.events
            return
        run: list[Kernel] = []
        for index, event in enumerate(trace.events):
            if isinstance(event, Kernel) and event.kind == "elementwise":
                run.append(event)
                continue
            if run:
                yield _fuse(run, index, trace.deaths)
                run = []
            yield event
        if run:
            yield _fuse(run, len(trace.events), trace.deaths)


def wire_bytes(operation: str, size: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring, ``size`` being the whole tensor's."""
    if operation == "all_reduce":
        return 2 * size * (ranks - 1) / ranks
    if operation in ("all_gather", "reduce_scatter"):
        return size * (ranks - 1) / ranks
    return size


def wire_hops(operation: str, ranks: int) -> int:
    """Steps of the ring."""
    if operation == "all_reduce":
        return 2 * (ranks - 1)
    return ranks - 1 if operation in ("all_gather", "reduce_scatter") else 1


def _fuse(run: list[Kernel], end: int, deaths: Mapping[int, int]) -> Kernel:
    """What a run of kernels that ends before event ``end`` reads from outside, and what of it lives on."""
    made: dict[int, int] = {}
    reads: dict[int, int] = {}
    for kernel in run:
        for storage, size in kernel.reads.items():
            if storage not in made:
                reads[storage] = max(size, reads.get(storage, 0))
        for storage, size in kernel.writes.items():
            made[storage] = max(size, made.get(storage, 0))
    writes = {storage: size for storage, size in made.items() if deaths.get(storage, end + 1) > end}
    return Kernel("elementwise", "+".join(kernel.name for kernel in run), 0.0, (0, 0, 0, 0), reads, writes)
