"""Sample, shuffle and blending indices: the C++ builder of ``csrc/index`` or, without it, NumPy."""

from __future__ import annotations

import logging
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import _megatron_med_index as _native
except ImportError:
    _native = None

Int64Array = npt.NDArray[np.int64]
Order = npt.NDArray[np.uint32] | npt.NDArray[np.int64]

_LARGEST_NATIVE_SHUFFLE = 2**32
_LARGEST_WEIGHT_SUM = 2**62
_log = logging.getLogger(__name__)
_announced: set[str] = set()


def native_builder() -> Any:
    """The compiled builder, or None; the first caller without one is told once."""
    if _native is None and "numpy" not in _announced:
        _announced.add("numpy")
        _log.warning(
            "The C++ index builder is not installed (pip install --no-build-isolation -e . builds it); "
            "the slower NumPy path serves."
        )
    return _native


def shuffled_range(count: int, rng: np.random.RandomState) -> Order:
    """0 to ``count`` - 1 in the order of ``rng.shuffle``, which is Megatron's order of documents and of samples.

    Returns:
        uint32, or int64 from 2^32 on.
    """
    native = native_builder() if count <= _LARGEST_NATIVE_SHUFFLE else None
    if native is not None:
        kind, key, position, *rest = rng.get_state()
        order, key, position = native.shuffled_range(count, key, position)
        rng.set_state((kind, key, position, *rest))
        return order
    order = np.arange(count, dtype=np.uint32 if count <= _LARGEST_NATIVE_SHUFFLE else np.int64)
    rng.shuffle(order)
    return order


def build_sample_index(sizes: npt.NDArray[np.int32], document_order: Order, sequence_length: int) -> Int64Array:
    """Where each sample begins: ``[samples + 1, 2]``, (position in document_order, token offset).

    A sample is ``sequence_length`` tokens and the one after them, which the next sample begins with. The last
    partial sample is dropped.
    """
    sizes = np.array(sizes, dtype=np.int32)  # aligned copy of the mapped file
    native = native_builder()
    if native is not None:
        return native.build_sample_index(sizes, document_order, sequence_length)
    ends = np.cumsum(sizes[document_order], dtype=np.int64)
    tokens = int(ends[-1]) if len(ends) else 0
    samples = (tokens - 1) // sequence_length if tokens else 0
    starts = np.arange(samples + 1, dtype=np.int64) * sequence_length
    position = np.searchsorted(ends, starts, side="right")
    before = np.concatenate((np.zeros(1, np.int64), ends))[position]
    index = np.stack((position, starts - before), axis=1).astype(np.int64)
    index[0] = 0
    return index


def integer_weights(weights: list[float]) -> Int64Array:
    """Weights as integers of the same ratios, exact for the decimals a user writes."""
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    denominator = np.lcm.reduce([fraction.denominator for fraction in fractions], dtype=object)
    whole = [int(fraction * denominator) for fraction in fractions]
    divisor = np.gcd.reduce(np.array(whole, dtype=object))
    whole = [weight // divisor for weight in whole]
    if sum(whole) > _LARGEST_WEIGHT_SUM:
        total = sum(whole)
        whole = [max(1, weight * _LARGEST_WEIGHT_SUM // total) for weight in whole]
    return np.array(whole, dtype=np.int64)


def build_blending_index(weights: list[float], samples: int) -> tuple[npt.NDArray[np.int16], Int64Array]:
    """Corpus of each sample and its number within that corpus, by Tijdeman's rule (1980).

    At every prefix each corpus is within one sample of its share; a longer index begins with the shorter one.
    """
    whole = integer_weights(weights)
    native = native_builder()
    if native is not None:
        return native.build_blending_index(whole, samples)
    return _blend(whole.tolist(), samples)


def _blend(weights: list[int], samples: int) -> tuple[npt.NDArray[np.int16], Int64Array]:
    total, sets = sum(weights), len(weights)
    slack = 2 * sets - 2 if sets > 1 else 1
    taken = [0] * sets
    set_of = np.empty(samples, np.int16)
    index_of = np.empty(samples, np.int64)
    for step in range(1, samples + 1):
        eligible = [i for i in range(sets) if sets == 1 or (weights[i] * step - total * taken[i]) * slack >= total]
        chosen = min(eligible, key=lambda i: Fraction((taken[i] + 1) * slack - 1, weights[i]))
        set_of[step - 1], index_of[step - 1] = chosen, taken[chosen]
        taken[chosen] += 1
    return set_of, index_of
