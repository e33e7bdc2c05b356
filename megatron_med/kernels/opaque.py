"""Operations that torch sees as one: their insides are not recorded, so each declares what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

import torch

NAMESPACE = "megatron_med"


@dataclass(frozen=True)
class Cost:
    """Of one call.

    Attributes:
        flops: floating-point operations.
        bytes: moved between device memory and the processor.
        workspace: bytes of memory that the call needs for itself while it runs.
        kind: how the device's share of its peak is named, as in ``tracing``.
        shape: of attention (heads x samples, queries, keys, head_dim).
    """

    flops: float
    bytes: int
    workspace: int = 0
    kind: Literal["opaque", "attention_forward", "attention_backward"] = "opaque"
    shape: tuple[int, int, int, int] = (0, 0, 0, 0)


_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_COSTS: dict[str, Callable[..., Cost]] = {}


def opaque_operation(
    fake: Callable[..., Any], cost: Callable[..., Cost], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the operation ``megatron_med::NAME`` of ``torch.library``, for every device.

    Args:
        fake: gives empty tensors of the result's shapes, of the same arguments.
        cost: of the same arguments.
        mutates: arguments that it writes to.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        _COSTS[name] = cost
        registered = getattr(getattr(torch.ops, NAMESPACE), name)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return registered(*arguments)

        return call

    return register


def declare_cost(name: str, cost: Callable[..., Cost]) -> None:
    """What an operation ``megatron_med::NAME`` costs that was registered elsewhere. ``cost``: of the same arguments."""
    _COSTS[name] = cost


def cost_of(function: Any, args: tuple[Any, ...]) -> Cost:
    """What a call of an opaque operation declares. ``function``: as a dispatch mode gets it."""
    return _COSTS[function._opname](*args)
