"""The table of combinations: every pair of values of two options that can run together stands in some row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from megatron_med.config.schema import Config, OverlapConfig
from megatron_med.config.validate import validate
from tests.training import MODELS, make_config

MOST_RANKS = 8
UNEVEN = {2: [2, 4], 3: [1, 3, 2], 4: [1, 2, 2, 1]}
"""Layers by number of stages or chunks, unlike what cost would give."""


@dataclass(frozen=True)
class Combination:
    """One row: a grid, and what else may differ between two runs that must train alike."""

    tensor: int
    pipeline: int
    shards: int
    replicate: int
    sharding: str
    schedule: str
    recompute: str
    sequence_parallel: bool
    layers: str
    family: str
    isolate_documents: bool
    overlap: bool

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.shards * self.replicate

    @property
    def name(self) -> str:
        grid = f"tp{self.tensor}-pp{self.pipeline}-shards{self.shards}-replicas{self.replicate}"
        flags = [
            "sp" if self.sequence_parallel else "no-sp",
            f"layers-{self.layers}",
            "isolated" if self.isolate_documents else "packed",
            "overlap" if self.overlap else "no-overlap",
        ]
        return "-".join([self.family, grid, self.sharding, self.schedule, f"recompute-{self.recompute}", *flags])

    def config(self, prefix: Path, precision: str = "fp32") -> Config:
        """The run of this row."""
        virtual = 2 if self.schedule == "interleaved" else 1
        config = make_config(
            prefix,
            MODELS[self.family] | {"num_layers": 6},
            precision=precision,
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_stages=virtual,
            replicate=self.replicate,
            sharding=self.sharding,
            schedule=self.schedule,
            sequence_parallel=self.sequence_parallel,
            layers_per_stage=UNEVEN[self.pipeline * virtual] if self.layers == "uneven" else None,
            overlap=self._overlap(),
        )
        config.recompute = "full" if self.recompute == "every_2nd" else self.recompute  # type: ignore[assignment]
        config.recompute_interval = 2 if self.recompute == "every_2nd" else 1
        config.data.isolate_documents = self.isolate_documents
        return config

    def _overlap(self) -> OverlapConfig:
        """Every switch on or off; FSDP2 has no switches for its own."""
        always = self.overlap or self.sharding == "full"
        return OverlapConfig(always, always, self.overlap, self.overlap)

    def can_run(self) -> bool:
        """Whether the options fit together, and onto a test machine."""
        virtual = 2 if self.schedule == "interleaved" else 1
        if self.layers == "uneven" and self.pipeline * virtual not in UNEVEN:
            return False
        # A name without what it names would cover nothing.
        if self.sequence_parallel and self.tensor == 1:
            return False
        if self.sharding != "none" and self.shards == 1:
            return False
        if self.schedule in ("interleaved", "zero_bubble") and self.pipeline == 1:
            return False
        return self.ranks <= MOST_RANKS and not validate(self.config(Path("unused")), self.ranks)

    def pairs(self) -> Iterator[tuple[tuple[int, Any], tuple[int, Any]]]:
        """Every two values of the row with the columns they stand in."""
        return itertools.combinations(enumerate(astuple(self)), 2)


VALUES: dict[str, tuple[Any, ...]] = {
    "tensor": (1, 2),
    "pipeline": (1, 2, 3),
    "shards": (1, 2),
    "replicate": (1, 2),
    "sharding": ("none", "optimizer", "full"),
    "schedule": ("gpipe", "1f1b", "interleaved", "zero_bubble"),
    "recompute": ("none", "selective", "full", "every_2nd"),
    "sequence_parallel": (True, False),
    "layers": ("by_cost", "uneven"),
    "family": ("llama", "gpt2"),
    "isolate_documents": (False, True),
    "overlap": (True, False),
}


def possible() -> list[Combination]:
    """Every combination that can run."""
    rows = (Combination(*values) for values in itertools.product(*VALUES.values()))
    return [row for row in rows if row.can_run()]


TABLE: list[Combination] = [
    # tensor, pipeline, shards, replicate, sharding, schedule, recompute, sequence_parallel, layers, family,
    # isolate_documents, overlap
    Combination(2, 1, 2, 2, "optimizer", "gpipe", "selective", True, "by_cost", "llama", True, False),
    Combination(1, 2, 2, 1, "none", "1f1b", "full", False, "uneven", "gpt2", False, True),
    Combination(2, 3, 1, 1, "none", "zero_bubble", "none", True, "by_cost", "gpt2", True, True),
    Combination(1, 3, 2, 1, "full", "interleaved", "every_2nd", False, "by_cost", "llama", False, False),
    Combination(1, 2, 2, 2, "optimizer", "zero_bubble", "none", False, "uneven", "llama", False, False),
    Combination(2, 2, 2, 1, "full", "interleaved", "selective", True, "uneven", "gpt2", True, True),
    Combination(2, 1, 1, 1, "none", "1f1b", "full", False, "by_cost", "llama", False, False),
    Combination(1, 2, 1, 1, "none", "gpipe", "every_2nd", False, "uneven", "gpt2", True, True),
    Combination(2, 1, 2, 2, "full", "1f1b", "every_2nd", True, "by_cost", "gpt2", False, True),
    Combination(1, 3, 2, 1, "optimizer", "1f1b", "selective", False, "uneven", "llama", True, True),
    Combination(1, 2, 2, 2, "optimizer", "interleaved", "full", False, "by_cost", "gpt2", False, False),
    Combination(1, 3, 2, 1, "full", "gpipe", "full", False, "uneven", "llama", False, True),
    Combination(2, 3, 1, 1, "none", "interleaved", "selective", False, "by_cost", "gpt2", False, False),
    Combination(1, 1, 2, 2, "full", "gpipe", "none", False, "by_cost", "gpt2", True, False),
    Combination(2, 3, 1, 1, "none", "zero_bubble", "full", True, "by_cost", "llama", True, True),
    Combination(2, 2, 2, 1, "optimizer", "zero_bubble", "every_2nd", True, "uneven", "llama", False, False),
    Combination(1, 2, 2, 1, "none", "1f1b", "none", False, "uneven", "llama", False, True),
    Combination(1, 2, 2, 1, "none", "zero_bubble", "selective", False, "uneven", "gpt2", True, True),
    Combination(1, 3, 2, 1, "none", "interleaved", "none", False, "by_cost", "llama", True, True),
    # Pairs are not all: the default and the hybrid one, where three options meet.
    Combination(2, 2, 2, 1, "optimizer", "1f1b", "none", True, "by_cost", "llama", False, True),
    Combination(1, 2, 2, 2, "optimizer", "interleaved", "full", False, "by_cost", "gpt2", False, True),
]
