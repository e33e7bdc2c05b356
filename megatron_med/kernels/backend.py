"""Chooses an implementation for every operation, once, and says which. No torch here.

An operation is a function of this package; what stands in its module in plain torch is its ``reference``
implementation. Others are listed here with the module that holds them, under the same name and with the same arguments,
best first. What is chosen depends on what is installed and what is asked for (``kernels`` of the configuration), so
that it is the same for the whole run; a module may have ``takes``, which says of a call's arguments whether it can be
served, by their type for example. bitsandbytes, unless asked for, serves on a GPU only: on a CPU plain torch is
as fast. ``native``, the kernels of ``csrc``, serves on a CPU, where they were compiled.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from types import ModuleType
from typing import Any, TypeVar

from megatron_med.errors import ConfigError

REFERENCE, BITSANDBYTES, NATIVE = "reference", "bitsandbytes", "native"

_IN_BITSANDBYTES = ((BITSANDBYTES, "megatron_med.kernels.bitsandbytes"),)
_IN_NATIVE = ((NATIVE, "megatron_med.kernels.native"),)
_IN_FUSED = ((NATIVE, "megatron_med.kernels.fused"),)
_IN_ATTENTION = ((NATIVE, "megatron_med.kernels.causal_attention"),)
_NEEDS = {BITSANDBYTES: "bitsandbytes", NATIVE: "_megatron_med_kernels"}
_DEVICES = {BITSANDBYTES: "cuda", NATIVE: "cpu"}
_TOLD = {BITSANDBYTES: " on a GPU, else reference", NATIVE: " on a CPU, else reference"}

_MISSING = {
    BITSANDBYTES: "bitsandbytes is not installed: pip install 'megatron_med[bitsandbytes]'",
    NATIVE: "the C++ kernels are not built: pip install --no-build-isolation -e . builds them and needs a C++ compiler",
}

OPERATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "rms_norm": _IN_FUSED,
    "layer_norm": _IN_FUSED,
    "swiglu": _IN_FUSED,
    "gelu_tanh": _IN_FUSED,
    "split_qkv": _IN_FUSED,
    "attention": _IN_ATTENTION,
    "cross_entropy_forward": _IN_FUSED,
    "cross_entropy_backward": _IN_FUSED,
    "int8_matmul": _IN_BITSANDBYTES,
    "nf4_dequantize": _IN_BITSANDBYTES,
    "quantize_blocks": _IN_BITSANDBYTES,
    "dequantize_blocks": _IN_BITSANDBYTES,
    "decode_attention": _IN_NATIVE,
}
"""Operation -> (implementation, module) in order of preference; the reference comes last."""

F = TypeVar("F", bound=Callable[..., Any])


_asked = "auto"
_in_place_of: str | None = None


def ask_for(name: str, device: str | None = None) -> None:
    """Says what is to serve from now on: ``auto``, ``reference``, ``native`` or ``bitsandbytes``.

    Args:
        name: of the configuration.
        device: ``cpu`` or ``cuda``, where the run's device is known.

    Raises:
        ConfigError: it is not installed, cannot be loaded, or does not serve on that device.
    """
    global _asked
    if name in _MISSING and not _is_installed(_NEEDS[name]):
        raise ConfigError(f"kernels is {name}: {_MISSING[name]}. With kernels: auto plain torch serves in their place.")
    if name == NATIVE and device not in (None, _DEVICES[NATIVE]):
        raise ConfigError(f"kernels is native, which serves on a CPU, and this run is on {device}. Write kernels: auto")
    if name != REFERENCE and device == _DEVICES[NATIVE] and _is_installed(_NEEDS[NATIVE]):
        importlib.import_module("megatron_med.kernels.fused")  # now, and not in the first step
    _asked = name


@contextmanager
def serving_on(device: str) -> Iterator[None]:
    """Within, what would serve on that device (``cpu``, ``cuda``) takes tensors of every device: a run on a cluster is
    planned on a machine that has none of its GPUs."""
    global _in_place_of
    before, _in_place_of = _in_place_of, device
    try:
        yield
    finally:
        _in_place_of = before


def planned_device() -> str | None:
    """The device of ``serving_on``; None outside of it."""
    return _in_place_of


def choices() -> dict[str, str]:
    """Operation -> name of the implementation that serves it, on the device that it is for."""
    return {operation: next((name for name, _ in _available(operation)), REFERENCE) for operation in OPERATIONS}


def serving(device: str) -> str:
    """Names of the implementations that serve beside plain torch on a device (``cpu``, ``cuda``); ``reference`` where
    none does."""
    found = {
        name
        for operation in OPERATIONS
        for name, _ in _available(operation)
        if _DEVICES.get(name, device) == device or name == _asked
    }
    return ", ".join(sorted(found)) or REFERENCE


def describe() -> str:
    """The choices in a line, operations of one implementation together."""
    by_name: dict[str, list[str]] = {}
    for operation, name in choices().items():
        only = _TOLD.get(name, "") if name != _asked else ""
        by_name.setdefault(name + only, []).append(operation)
    return "kernels: " + "; ".join(f"{name} ({', '.join(operations)})" for name, operations in by_name.items())


def operation(reference: F) -> F:
    """Puts the chosen implementation in the place of the reference."""
    if not OPERATIONS[reference.__name__]:
        return reference

    name = reference.__name__

    @wraps(reference)
    def chosen(*arguments: Any, **options: Any) -> Any:
        device = _in_place_of or getattr(getattr(arguments[0], "device", None), "type", None)
        for module in _modules(OPERATIONS[name], _asked, device, _is_installed):
            takes = getattr(module, "takes", None)
            if takes is None or takes(*arguments, **options):
                return getattr(module, name)(*arguments, **options)
        return reference(*arguments, **options)

    return chosen  # type: ignore[return-value]


@cache  # a call of a small kernel takes less time than to find it
def _modules(
    listed: tuple[tuple[str, str], ...], asked: str, device: str | None, is_installed: Callable[[str], bool]
) -> tuple[ModuleType, ...]:
    """Those of ``listed`` that serve on a device (``cpu``, ``cuda``), best first."""
    serve = [
        module
        for name, module in _wanted(listed, asked, is_installed)
        if name not in _DEVICES or _DEVICES[name] == device or name == asked == BITSANDBYTES  # then on a CPU, too
    ]
    return tuple(importlib.import_module(module) for module in serve)


def serves(name: str, operation: str, device: str) -> bool:
    """Whether an implementation takes an operation on a device (``cpu``, ``cuda``)."""
    return device == _DEVICES[name] and any(name == other for other, _ in _available(operation)[:1])


@cache
def say_that_native_is_missing() -> None:
    """Once, where the compiled kernels would serve."""
    if _asked != REFERENCE and not _is_installed(_NEEDS[NATIVE]):
        logging.getLogger(__name__).warning(
            "The C++ kernels are not installed (pip install --no-build-isolation -e . builds them); plain torch serves."
        )


def _available(operation: str) -> list[tuple[str, str]]:
    """Implementations that are installed, and wanted."""
    return _wanted(OPERATIONS[operation], _asked, _is_installed)


def _wanted(
    listed: tuple[tuple[str, str], ...], asked: str, is_installed: Callable[[str], bool]
) -> list[tuple[str, str]]:
    if asked == REFERENCE:
        return []
    found = [(name, module) for name, module in listed if is_installed(module)]
    return [(name, module) for name, module in found if name not in _NEEDS or is_installed(_NEEDS[name])]


@cache
def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in is not
        return False
