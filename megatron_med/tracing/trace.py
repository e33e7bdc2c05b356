"""What a recording holds: kernels, collectives and waits in order, and when memory was freed. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

KernelKind = Literal["product", "attention_forward", "attention_backward", "elementwise", "opaque"]


@dataclass(frozen=True)
class Kernel:
    """One launch on the device.

    Attributes:
        kind: what bounds its time.
        name: operation.
        flops: of a product or attention; 0 for element-wise work, which memory bounds; of an opaque operation what it
            declares, as its bytes.
        shape: of a product: batch, rows, columns, inner.
        reads, writes: storage -> bytes.
    """

    kind: KernelKind
    name: str
    flops: float
    shape: tuple[int, int, int, int]
    reads: Mapping[int, int]
    writes: Mapping[int, int]


@dataclass(frozen=True)
class Collective:
    """A collective or message is issued.

    Attributes:
        number: that its ``Wait`` refers to.
        operation: all_reduce, all_gather, reduce_scatter, broadcast, send or receive.
        group: label of the group.
        size: bytes of the larger of input and output.
        ranks: of the group.
    """

    number: int
    operation: str
    group: str
    size: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Wait:
    """The computation needs the result of a collective."""

    number: int


Event = Kernel | Collective | Wait


@dataclass(eq=False)
class Trace:
    """What was recorded; two traces are equal only where they are one.

    Attributes:
        events: in order.
        deaths: storage -> number of events before it was freed; storages that outlive the trace are absent.
    """

    events: list[Event] = field(default_factory=list)
    deaths: dict[int, int] = field(default_factory=dict)

    @property
    def kernels(self) -> list[Kernel]:
        return [event for event in self.events if isinstance(event, Kernel)]

    @property
    def collectives(self) -> list[Collective]:
        return [event for event in self.events if isinstance(event, Collective)]
