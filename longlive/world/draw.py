"""Random choices that are the same on every machine: a counter-based integer hash (splitmix64), no library generator."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
_MASK = (1 << 64) - 1


class Draw:
    """A stream of choices that belongs to `key` (any ints and strings) alone."""

    def __init__(self, *key: int | str):
        self._state = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")

    def _next(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        return self._next() % n

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + self.below(high - low + 1)

    def unit(self) -> float:
        """A number in [0, 1)."""
        return self._next() / 2**64

    def spread(self, size: float) -> float:
        """A number in [-size, size)."""
        return (2 * self.unit() - 1) * size

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different members of `options`, in random order."""
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(count)]
