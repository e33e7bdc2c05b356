"""Loads the kernels of ``csrc/kernels``. Here are those of generation, in ``fused.py`` those of training, under the
names and with the arguments of the references; see ``backend.py``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._python_dispatch import _disable_current_modes

from megatron_med.errors import ConfigError
from megatron_med.kernels.opaque import NAMESPACE

VERSION = 3
"""Of the operations' names and arguments, the same as in ``csrc/kernels/registration.cpp``."""
_AGAIN = (
    "pip install --no-build-isolation -e . builds them again; with kernels: reference plain torch serves in their place"
)


def _load() -> Any:
    """The operations.

    Raises:
        ConfigError: they were built for another torch, or from other sources.
    """
    spec = importlib.util.find_spec("_megatron_med_kernels")
    assert spec is not None, "backend.py asks whether it is there"
    try:
        torch.ops.load_library(str(spec.origin))
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0].removeprefix(f"{spec.origin}: ")
        raise ConfigError(
            f"The C++ kernels ({spec.origin}) cannot be loaded by torch {torch.__version__}: {reason}. {_AGAIN}."
        ) from None
    operations = torch.ops.megatron_med
    with _disable_current_modes():  # it may be a trace that needs the first kernel
        found = operations.version() if hasattr(operations, "version") else 1
    if found != VERSION:
        raise ConfigError(
            f"The C++ kernels ({spec.origin}) are of version {found}, and this megatron_med needs {VERSION}: {_AGAIN}."
        )
    return operations


OPERATIONS = _load()


def cpu_capability() -> str:
    """The instruction set that the kernels use: ``baseline``, ``avx2`` or ``avx512``.

    Raises:
        ConfigError: MEGATRON_MED_CPU_CAPABILITY asks for one that is not there.
    """
    try:
        return OPERATIONS.cpu_capability()
    except RuntimeError as error:
        raise ConfigError(str(error).splitlines()[0]) from None


with _disable_current_modes():  # it may be a trace that needs the first kernel
    cpu_capability()  # before a kernel needs to know


class KernelFunction(Function):
    """A function whose forward pass is a kernel."""

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        """``apply``, and where no graph is recorded without what that costs: of a small tensor's time it is half."""
        return cls.apply(*arguments) if torch.is_grad_enabled() else cls.forward(_NO_GRAPH, *arguments)


class _NoGraph:
    """In the place of a context that nobody looks into."""

    @staticmethod
    def save_for_backward(*tensors: Tensor | None) -> None:
        pass


_NO_GRAPH = _NoGraph()


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, kept: tuple[Tensor, Tensor], places: Tensor, lengths: Sequence[int]
) -> Tensor:
    """See ``cached_attention.decode_attention``."""
    new = (tensor.to(kept[0].dtype) for tensor in (query.contiguous(), key, value))
    return OPERATIONS.decode_attention(*new, *kept, places).to(query.dtype).flatten(1)


@torch.library.register_fake(f"{NAMESPACE}::decode_attention")
def _fake(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    return torch.empty_like(query)
