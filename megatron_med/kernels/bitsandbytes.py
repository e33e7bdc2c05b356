"""bitsandbytes' kernels under the names and with the arguments of the references; see ``backend.py``."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from megatron_med.kernels.blockwise import BLOCK as GROUP
from megatron_med.kernels.blockwise import dynamic_codes
from megatron_med.kernels.nf4 import BLOCK

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a package that serves products of its own
import bitsandbytes  # noqa: E402, F401  (registers its operations)

_OPERATIONS = torch.ops.bitsandbytes


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """See ``int8.int8_matmul``."""
    return _OPERATIONS.int8_linear_matmul(x, weight)


def nf4_dequantize(codes: Tensor, maxima: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """See ``nf4.nf4_dequantize``. As rows of one block, whatever the weight's are: with some other widths, such as 96,
    the kernel for the CPU takes a neighbour's maximum."""
    shape = (count // BLOCK, BLOCK) if count % BLOCK == 0 else (1, count)
    return _OPERATIONS.dequantize_4bit(codes.view(-1, 1), maxima, BLOCK, "nf4", shape, dtype).view(-1)


def quantize_blocks(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """See ``blockwise.quantize_blocks``."""
    return _OPERATIONS.quantize_blockwise(values, dynamic_codes(signed, values.device), GROUP)


def dequantize_blocks(codes: Tensor, maxima: Tensor, signed: bool) -> Tensor:
    """See ``blockwise.dequantize_blocks``."""
    code = dynamic_codes(signed, codes.device)
    return _OPERATIONS.dequantize_blockwise(codes, maxima, code, GROUP, torch.float32)
