"""Chooses an implementation for every operation, once, and says which. No torch here.

An operation is a function of this package; what stands in its module in plain torch is its ``reference``
implementation. Others are listed here with the module that holds them, under the same name and with the same arguments,
best first. What is chosen depends on what is installed and what is asked for (``kernels`` of the configuration), so
that it is the same for the whole run. bitsandbytes, unless asked for, serves on a GPU only: on a CPU plain torch is as
fast.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

from megatron_med.errors import ConfigError

REFERENCE, BITSANDBYTES = "reference", "bitsandbytes"

_IN_BITSANDBYTES = ((BITSANDBYTES, "megatron_med.kernels.bitsandbytes"),)

OPERATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "rms_norm": (),
    "layer_norm": (),
    "swiglu": (),
    "gelu_tanh": (),
    "apply_rotary_emb": (),
    "attention": (),
    "cross_entropy_forward": (),
    "cross_entropy_backward": (),
    "int8_matmul": _IN_BITSANDBYTES,
    "nf4_dequantize": _IN_BITSANDBYTES,
    "quantize_blocks": _IN_BITSANDBYTES,
    "dequantize_blocks": _IN_BITSANDBYTES,
}
"""Operation -> (implementation, module) in order of preference; the reference comes last."""

F = TypeVar("F", bound=Callable[..., Any])


_asked = "auto"


def ask_for(name: str) -> None:
    """Says what is to serve from now on: ``auto``, ``reference`` or ``bitsandbytes``.

    Raises:
        ConfigError: it is not installed.
    """
    global _asked
    if name == BITSANDBYTES and not _is_installed(BITSANDBYTES):
        raise ConfigError(
            "kernels is bitsandbytes, which is not installed: pip install 'megatron_med[bitsandbytes]'. With kernels: "
            "auto plain torch serves in its place."
        )
    _asked = name


def choices() -> dict[str, str]:
    """Operation -> name of the implementation that serves it, on a GPU."""
    return {operation: next((name for name, _ in _available(operation)), REFERENCE) for operation in OPERATIONS}


def describe() -> str:
    """The choices in a line, operations of one implementation together."""
    by_name: dict[str, list[str]] = {}
    for operation, name in choices().items():
        only = " on a GPU, else reference" if name == BITSANDBYTES and _asked == "auto" else ""
        by_name.setdefault(name + only, []).append(operation)
    return "kernels: " + "; ".join(f"{name} ({', '.join(operations)})" for name, operations in by_name.items())


def operation(reference: F) -> F:
    """Puts the chosen implementation in the place of the reference."""
    if not OPERATIONS[reference.__name__]:
        return reference

    @wraps(reference)
    def chosen(*arguments: Any) -> Any:
        for name, module in _available(reference.__name__):
            if name != BITSANDBYTES or _asked == BITSANDBYTES or arguments[0].is_cuda:
                return getattr(importlib.import_module(module), reference.__name__)(*arguments)
        return reference(*arguments)

    return chosen  # type: ignore[return-value]


def _available(operation: str) -> list[tuple[str, str]]:
    """Implementations that are installed, and wanted."""
    if _asked == REFERENCE:
        return []
    found = [(name, module) for name, module in OPERATIONS[operation] if _is_installed(module)]
    return [(name, module) for name, module in found if name != BITSANDBYTES or _is_installed(BITSANDBYTES)]


@cache
def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in is not
        return False
