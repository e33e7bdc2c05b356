"""Loads the kernels of ``csrc/kernels``. Here are those of generation, in ``fused.py`` those of training, under the
names and with the arguments of the references; see ``backend.py``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from megatron_med.errors import ConfigError
from megatron_med.kernels.opaque import NAMESPACE

_SPEC = importlib.util.find_spec("_megatron_med_kernels")
assert _SPEC is not None, "backend.py asks whether it is there"
torch.ops.load_library(str(_SPEC.origin))
OPERATIONS = torch.ops.megatron_med


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


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, kept: tuple[Tensor, Tensor], places: Tensor, lengths: Sequence[int]
) -> Tensor:
    """See ``cached_attention.decode_attention``."""
    new = (tensor.to(kept[0].dtype) for tensor in (query.contiguous(), key, value))
    return OPERATIONS.decode_attention(*new, *kept, places).to(query.dtype).flatten(1)


@torch.library.register_fake(f"{NAMESPACE}::decode_attention")
def _fake(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    return torch.empty_like(query)
