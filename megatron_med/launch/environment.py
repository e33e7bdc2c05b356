"""The ranks that a launcher tells of in the environment. No torch here."""

from __future__ import annotations

import os

from megatron_med.errors import ConfigError

_REMEDY = "Start with torchrun, which sets all of this, or unset RANK and WORLD_SIZE for one process."


def read_ranks() -> tuple[int, int]:
    """Rank and number of ranks: ``RANK`` and ``WORLD_SIZE``; one rank where there is no more of both.

    Raises:
        ConfigError: what is set is no rank of a world.
    """
    rank, world_size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not rank and world_size in ("", "1"):
        return 0, 1
    if rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size):
        return int(rank), int(world_size)
    given = {"RANK": rank, "WORLD_SIZE": world_size}
    told = " and ".join(f"{name} is {value!r}" if value else f"{name} is not set" for name, value in given.items())
    raise ConfigError(f"In the environment {told}: that is no rank. {_REMEDY}")


def read_master() -> tuple[str, int]:
    """Where rank 0 is: ``MASTER_ADDR`` and ``MASTER_PORT``.

    Raises:
        ConfigError: they are not set, or are no address.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if host and port.isdecimal():
        return host, int(port)
    raise ConfigError(
        f"The environment tells of several ranks, but MASTER_ADDR is {host!r} and MASTER_PORT {port!r}: nobody knows "
        f"where rank 0 is. {_REMEDY}"
    )
