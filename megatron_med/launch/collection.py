"""Python's collector of cycles at the start of a process.

What is imported stays. Walking through it again and again takes a fifth of the time that imports take, and a full pass
over what torch has brought a quarter of a second, in the middle of some step, on each rank in another.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Collects nothing within; what is there at the end is never walked through again (``gc.freeze``)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
