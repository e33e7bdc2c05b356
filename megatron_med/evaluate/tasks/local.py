"""Local files under lm-eval's own command: ``python -m megatron_med.evaluate --metadata '{"data": "DIR"}'``."""

from __future__ import annotations

from typing import Any

import datasets

from megatron_med.evaluate.catalogue import rows_of


def load(**metadata: Any) -> dict[str, datasets.Dataset]:
    """The splits of a task that DIR has a file for; every row holds what the prompts are made of."""
    splits = rows_of(metadata)
    return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
