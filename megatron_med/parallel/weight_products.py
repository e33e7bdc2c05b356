"""Weight-gradient products that may wait: the second half of a split backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

WeightProduct = Callable[[], None]


class WeightProducts:
    """Weight-gradient products: run at once, or kept for later within ``put_off``."""

    def __init__(self) -> None:
        self._kept: list[WeightProduct] | None = None

    @property
    def are_put_off(self) -> bool:
        return self._kept is not None

    def submit(self, product: WeightProduct) -> None:
        """Runs or keeps a product."""
        if self._kept is None:
            product()
        else:
            self._kept.append(product)

    @contextmanager
    def put_off(self) -> Iterator[list[WeightProduct]]:
        """Products submitted within are appended to the list instead of run: BackwardInput's second half."""
        assert self._kept is None, "one backward pass at a time"
        self._kept = []
        try:
            yield self._kept
        finally:
            self._kept = None
