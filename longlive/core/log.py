"""The project's logger, and the only place that reads the environment (with the launcher)."""

from __future__ import annotations

import functools
import logging
import os

logger = logging.getLogger("longlive")


@functools.lru_cache(maxsize=None)
def warn_once(message: str) -> None:
    """Log `message` as a warning the first time it is given in this process."""
    logger.warning(message)


def environment(name: str, default: str | None = None) -> str | None:
    """The value of an environment variable, or `default`."""
    return os.environ.get(name, default)


def launch_rank() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun sets them; (0, 1, 0) under plain python."""
    return tuple(int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
