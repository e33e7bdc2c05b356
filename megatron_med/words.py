"""Numbers in sentences."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "s") -> str:
    """A number and what is counted: ``1 rank``, ``2 ranks``; ``plural`` is what the noun then ends with."""
    return f"{number:,} {noun}{'' if number == 1 else plural}"
