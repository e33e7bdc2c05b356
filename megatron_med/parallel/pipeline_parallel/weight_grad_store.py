"""Weight gradients that may wait: the second half of a split backward pass (Qi et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

WeightGrad = Callable[[], None]
"""A weight-gradient product that adds to its main gradient."""


class WeightGradStore:
    """Keeps the weight-gradient products of a backward pass for later, while it is asked to. One for a rank's stage."""

    def __init__(self) -> None:
        self._deferred: list[WeightGrad] | None = None

    @property
    def is_deferring(self) -> bool:
        """Whether a product is to be put here instead of being run."""
        return self._deferred is not None

    def put(self, product: WeightGrad) -> None:
        """Keeps a product."""
        assert self._deferred is not None, "products are kept within defer() only"
        self._deferred.append(product)

    @contextmanager
    def defer(self) -> Iterator[list[WeightGrad]]:
        """Products put within are appended to the list: the second half of BackwardInput."""
        assert self._deferred is None, "one backward pass at a time"
        self._deferred = []
        try:
            yield self._deferred
        finally:
            self._deferred = None
