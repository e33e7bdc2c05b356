"""Reads the next step's data while this one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """One item ahead, in a thread of its own. What an item holds is a function of its number alone, so that a resume
    at any number reads the same as an uninterrupted run.

    Args:
        load: makes item ``number``; called from the thread, in order.
        last: number of the last item.
    """

    def __init__(self, load: Callable[[int], T], last: int) -> None:
        self._load = load
        self._last = last
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next: tuple[int, Future[T]] | None = None

    def take(self, number: int) -> T:
        """Item ``number``, waiting for it where it is not there yet; the one after it is begun.

        Raises:
            Exception: whatever ``load`` raised for this item.
        """
        if self._next is None or self._next[0] != number:
            self._begin(number)
        assert self._next is not None, "an item was begun"
        future = self._next[1]
        item = future.result()
        self._next = None
        if number < self._last:
            self._begin(number + 1)
        return item

    def _begin(self, number: int) -> None:
        self._next = number, self._pool.submit(self._load, number)

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
