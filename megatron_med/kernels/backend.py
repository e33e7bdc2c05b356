"""Chooses an implementation for every operation, once, and says which. No torch here.

An operation is a function of ``functional.py`` or ``cross_entropy.py``; what stands there in plain torch is its
``reference`` implementation. Others are listed here with the module that holds them, under the same name and with the
same arguments, best first. What is chosen depends on what is installed and on nothing else, so that it is the same for
the whole run.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

REFERENCE = "reference"

OPERATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "rms_norm": (),
    "layer_norm": (),
    "swiglu": (),
    "gelu_tanh": (),
    "apply_rotary_emb": (),
    "attention": (),
    "cross_entropy_forward": (),
    "cross_entropy_backward": (),
    "int8_matmul": (),
    "nf4_dequantize": (),
    "quantize_blocks": (),
    "dequantize_blocks": (),
}
"""Operation -> (implementation, module) in order of preference; the reference comes last."""

F = TypeVar("F", bound=Callable[..., Any])


def choices() -> dict[str, str]:
    """Operation -> name of the implementation that serves it."""
    return {operation: next((name for name, _ in _available(operation)), REFERENCE) for operation in OPERATIONS}


def describe() -> str:
    """The choices in a line, operations of one implementation together."""
    by_name: dict[str, list[str]] = {}
    for operation, name in choices().items():
        by_name.setdefault(name, []).append(operation)
    return "kernels: " + "; ".join(f"{name} ({', '.join(operations)})" for name, operations in by_name.items())


def operation(reference: F) -> F:
    """Puts the chosen implementation in the place of the reference."""
    for _, module in _available(reference.__name__):
        return getattr(importlib.import_module(module), reference.__name__)
    return reference


def _available(operation: str) -> list[tuple[str, str]]:
    """Implementations whose module is installed."""
    return [(name, module) for name, module in OPERATIONS[operation] if _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in is not
        return False
