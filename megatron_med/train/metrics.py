"""What the numbers of a step are made of: memory, and the peak that speed is a share of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_med.model.flops import PEAK_FLOPS

Metrics = dict[str, Any]


def peak_flops(device: torch.device) -> float | None:
    """Peak of this device; None where it is not in the table (a CPU, for one)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def memory_bytes(device: torch.device) -> int:
    """Largest memory this process has held: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
