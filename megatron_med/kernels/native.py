"""The kernels of ``csrc/kernels`` under the names and with the arguments of the references; see ``backend.py``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_med.errors import ConfigError
from megatron_med.kernels.opaque import NAMESPACE

_SPEC = importlib.util.find_spec("_megatron_med_kernels")
assert _SPEC is not None, "backend.py asks whether it is there"
torch.ops.load_library(str(_SPEC.origin))
_OPERATIONS = torch.ops.megatron_med


def cpu_capability() -> str:
    """The instruction set that the kernels use: ``baseline``, ``avx2`` or ``avx512``.

    Raises:
        ConfigError: MEGATRON_MED_CPU_CAPABILITY asks for one that is not there.
    """
    try:
        return _OPERATIONS.cpu_capability()
    except RuntimeError as error:
        raise ConfigError(str(error).splitlines()[0]) from None


cpu_capability()  # before a kernel needs to know


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, kept: tuple[Tensor, Tensor], places: Tensor, lengths: Sequence[int]
) -> Tensor:
    """See ``cached_attention.decode_attention``."""
    new = (tensor.to(kept[0].dtype) for tensor in (query.contiguous(), key, value))
    return _OPERATIONS.decode_attention(*new, *kept, places).to(query.dtype).flatten(1)


@torch.library.register_fake(f"{NAMESPACE}::decode_attention")
def _fake(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    return torch.empty_like(query)
