"""Best-fit packing: which conversations share a sample."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def best_fit(lengths: npt.NDArray[np.int64], capacity: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Packs items by best-fit decreasing (Johnson 1974): the longest first, each into the fullest bin that takes it.

    Args:
        lengths: of the items, from 1 to ``capacity``; of equal ones the earlier comes first.
        capacity: of a bin.

    Returns:
        The items, bin after bin, and where each bin begins in that list (with the end behind the last).
    """
    bin_of = np.empty(len(lengths), np.int64)
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that is left
    rooms = 0  # a bit for every room that some open bin has: the smallest that fits is found at once
    bins = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = open_bins[room].pop()
            if not open_bins[room]:
                rooms &= ~(1 << room)
        else:
            room, number = capacity, bins
            bins += 1
        bin_of[item] = number
        left = room - length
        if left:
            open_bins[left].append(number)
            rooms |= 1 << left
    items = np.argsort(bin_of, kind="stable")
    return items, np.searchsorted(bin_of[items], np.arange(bins + 1))
