"""Clusters by name: what an accelerator and its links can do, each figure with its source. No torch here.

``a100-80g:16x8`` is 16 nodes of 8 A100-80GB. The figures are properties of the hardware and its libraries; none was
fitted to a training run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from megatron_med.config import Config
from megatron_med.errors import ConfigError
from megatron_med.model.flops import PEAK_FLOPS

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One kind of GPU in its usual node. Bandwidths in bytes/s, one direction; shares are of the peak.

    Attributes:
        peak_flops: dense bf16 FLOP/s.
        memory: bytes that a process can allocate.
        reserved: of these, what CUDA, NCCL and cuBLAS keep, and what fragmentation costs.
        memory_bandwidth, memory_share: of the device memory, and what streaming kernels reach of it.
        multiprocessors: SMs.
        tile: output tile of the fastest matrix product.
        product_share: share of the peak that the best matrix product reaches.
        attention_forward, attention_backward: shares of the peak of FlashAttention-2, causal.
        attention1_forward, attention1_backward: the same of the first FlashAttention.
        kernel_seconds: least time of a kernel, its launch gap included.
        link_bandwidth, link_share: between the GPUs of a node, and what NCCL reaches of it.
        link_latency: seconds of one hop in a node.
        collective_multiprocessors: SMs that an NCCL kernel takes from a computation that runs at the same time.
        nic_bandwidth, nic_share: of one network card, and what NCCL reaches of it.
        nic_latency: seconds of one hop between nodes.
        nics: network cards of a node.
    """

    name: str
    peak_flops: float
    memory: float
    memory_bandwidth: float
    multiprocessors: int
    product_share: float
    link_bandwidth: float
    nic_bandwidth: float = 25e9
    nics: int = 8
    reserved: float = 3 * GIB
    memory_share: float = 0.9
    tile: tuple[int, int] = (128, 256)
    attention_forward: float = 0.615
    attention_backward: float = 0.515
    attention1_forward: float = 0.40
    attention1_backward: float = 0.30
    kernel_seconds: float = 4e-6
    link_share: float = 0.78
    link_latency: float = 2e-6
    collective_multiprocessors: int = 24
    nic_share: float = 0.92
    nic_latency: float = 6e-6

    def product_efficiency(self, rows: int, columns: int, batch: int = 1) -> float:
        """Share of the peak of a ``[rows, k] @ [k, columns]`` product: the last wave of output tiles leaves SMs idle.

        Wave quantisation (NVIDIA, Matrix Multiplication Background User's Guide); the best of the full, half and
        quarter tile counts, smaller tiles reading their operands more often.
        """
        best = 0.0
        high, wide = self.tile
        for tile_rows, tile_columns, share in ((high, wide, 1.0), (high, wide // 2, 0.9), (high // 2, wide // 4, 0.6)):
            tiles = batch * math.ceil(rows / tile_rows) * math.ceil(columns / tile_columns)
            waves = math.ceil(tiles / self.multiprocessors)
            useful = batch * rows * columns / (waves * self.multiprocessors * tile_rows * tile_columns)
            best = max(best, share * useful)
        return self.product_share * best


_HOPPER: dict[str, Any] = {
    "nic_bandwidth": 50e9,
    "attention_forward": 0.38,
    "attention_backward": 0.32,
    "attention1_forward": 0.24,
    "attention1_backward": 0.18,
}

KINDS = {
    kind.name: kind
    for kind in (
        Accelerator("a100-80g", PEAK_FLOPS["A100"], 79.1 * GIB, 2.039e12, 108, 0.824, 300e9),
        Accelerator("a100-40g", PEAK_FLOPS["A100"], 39.4 * GIB, 1.555e12, 108, 0.824, 300e9),
        Accelerator("h100-80g", PEAK_FLOPS["H100"], 79.1 * GIB, 3.35e12, 132, 0.76, 450e9, **_HOPPER),
        Accelerator("h200", PEAK_FLOPS["H200"], 139.8 * GIB, 4.8e12, 132, 0.76, 450e9, **_HOPPER),
    )
}

SOURCES = {
    "peak_flops": "NVIDIA data sheet, dense bf16, SXM",
    "memory": "torch.cuda.get_device_properties(0).total_memory",
    "reserved": "our estimate: CUDA context 0.5 GiB, NCCL buffers of about ten groups 1 GiB, cuBLAS workspace, "
    "fragmentation",
    "memory_bandwidth": "NVIDIA data sheet",
    "memory_share": "BabelStream-like copies reach 0.88 to 0.92",
    "multiprocessors": "NVIDIA data sheet",
    "tile": "NVIDIA, Matrix Multiplication Background User's Guide: 256 x 128 is the most efficient tile",
    "product_share": "He 2024 (thonking.ai): 257 of 312 TFLOP/s for 8192^3 of random numbers on an A100 under its "
    "power limit; H100: Bekman, ml-engineering, 792 of 989 at best, less the A100's 5 % between best and random",
    "attention_forward": "A100: Dao 2023 (FlashAttention-2), 50 to 73 % of the peak, the middle; H100: Shah et al. "
    "2024 (FlashAttention-3), whose measure of FlashAttention-2 there is 35 % for both passes",
    "attention_backward": "A100: Dao 2023, ten points less than forward (73 and 63 % at best); H100: as forward",
    "attention1_forward": "A100: Dao 2023 on the first one, 30 to 50 %, the middle; H100: in the same proportion",
    "attention1_backward": "A100: Dao 2023 on the first one, 25 to 35 %, the middle; H100: in the same proportion",
    "kernel_seconds": "our estimate: shortest kernel plus gap in a stream that is never empty",
    "link_bandwidth": "NVIDIA data sheet: NVLink 600 (A100) and 900 GB/s (H100) in both directions",
    "link_share": "nccl-tests on 8 x A100: bus bandwidth of 230 to 235 of 300 GB/s",
    "link_latency": "our estimate, of the order of NCCL's tuning model for rings over NVLink",
    "collective_multiprocessors": "NCCL runs 24 channels, a thread block each, on NVSwitch nodes",
    "nic_bandwidth": "200 Gb/s (A100 nodes) and 400 Gb/s (H100 nodes) InfiniBand or RoCE",
    "nic_share": "nccl-tests over one 200 Gb/s card: about 23 of 25 GB/s",
    "nic_latency": "our estimate, of the order of NCCL's tuning model for a network hop",
    "nics": "--nics; without it one a GPU, as in a DGX",
}
"""Where each figure comes from, by field of ``Accelerator``."""


@dataclass(frozen=True)
class Cluster:
    """Some nodes of one accelerator."""

    accelerator: Accelerator
    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable_memory(self) -> float:
        """Bytes a rank may plan with."""
        return self.accelerator.memory - self.accelerator.reserved

    @property
    def name(self) -> str:
        return f"{self.accelerator.name}:{self.nodes}x{self.gpus_per_node}"

    def bandwidth(self, ranks: tuple[int, ...]) -> tuple[float, float]:
        """Bytes/s a rank of this group sends, while all other groups of the same kind are as busy, and the latency
        of one hop.

        A ring leaves each node once, so a group of ``n`` ranks on a node has ``n / gpus_per_node`` of its cards.
        """
        kind = self.accelerator
        nodes = {rank // self.gpus_per_node for rank in ranks}
        inside = kind.link_bandwidth * kind.link_share
        if len(nodes) == 1:
            return inside, kind.link_latency
        share_of_node = len(ranks) / len(nodes) / self.gpus_per_node
        cards = kind.nics * kind.nic_bandwidth * kind.nic_share * share_of_node
        return min(inside, cards), kind.nic_latency


def parse_cluster(text: str, nics: int | None = None) -> Cluster:
    """``KIND:NODESxGPUS``, for example ``a100-80g:16x8``.

    Args:
        text: the cluster.
        nics: network cards of a node, instead of the kind's own.

    Raises:
        ConfigError: an unknown kind or another form.
    """
    match = re.fullmatch(r"([^:]+):(\d+)x(\d+)", text)
    if match is None or int(match[2]) < 1 or int(match[3]) < 1:
        raise ConfigError(f"--cluster is {text!r}: expected KIND:NODESxGPUS, such as a100-80g:16x8.")
    if match[1] not in KINDS:
        raise ConfigError(f"--cluster is {text!r}: the kind {match[1]!r} is unknown. Known: {', '.join(KINDS)}.")
    if nics is not None and nics < 1:
        raise ConfigError(f"--nics is {nics}: a node has at least 1 network card.")
    kind = KINDS[match[1]]
    if nics is not None:
        kind = dataclasses.replace(kind, nics=nics)
    return Cluster(kind, int(match[2]), int(match[3]))


def check_precision(config: Config) -> None:
    """Raises ConfigError for fp32."""
    if config.precision == "fp32":
        raise ConfigError("precision is fp32: the figures of clusters are for half precision. Take bf16.")
