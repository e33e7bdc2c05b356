"""What every data set gives for one row of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Sample:
    """One row of a batch. The inputs are all tokens but the last, the labels all but the first.

    Attributes:
        tokens: ``[seq + 1]`` ids.
        loss_mask: ``[seq]`` fp32, 1 where the label counts.
        document_lengths: inputs of each document, in order; they add up to seq. Documents do not see each other, and
            positions restart with each: where attention may cross their borders, they are one.
        labels: ``[seq]``, where they are not the next tokens.
    """

    tokens: npt.NDArray[np.integer]
    loss_mask: npt.NDArray[np.float32]
    document_lengths: tuple[int, ...]
    labels: npt.NDArray[np.integer] | None = None


def pieces(length: int, longest: int) -> list[int]:
    """Lengths of documents of at most ``longest`` tokens that add up to ``length``."""
    return [min(longest, length - begin) for begin in range(0, length, longest)]


def without_borders(tokens: npt.NDArray[np.integer]) -> Sample:
    """All of ``[seq + 1]`` tokens as one document, every label counting."""
    length = len(tokens) - 1
    return Sample(tokens, np.ones(length, dtype=np.float32), (length,))
