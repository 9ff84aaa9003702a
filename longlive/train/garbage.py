"""Python's collector of cyclic garbage runs between chosen steps, equal on all ranks, instead of at any moment on each.

A collection of everything that a training holds takes as long as many small steps; one rank that collects holds up all that wait for it. Training makes
no cyclic garbage that holds tensors, so nothing large waits for a collection.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Garbage:
    """While open, garbage is collected after every `every` steps and not otherwise. What exists already is not looked at again."""

    def __init__(self, every: int):
        self.every, self.automatic = every, True

    def __enter__(self) -> "Garbage":
        self.automatic = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def after(self, step: int) -> None:
        """`step` steps have been taken."""
        if step % self.every == 0:
            gc.collect()

    @contextmanager
    def as_usual(self) -> Iterator[None]:
        """Inside, Python collects when it likes: for work that is not a step."""
        if self.automatic:
            gc.enable()
        try:
            yield
        finally:
            gc.disable()

    def __exit__(self, *exception: Any) -> None:
        gc.unfreeze()
        if self.automatic:
            gc.enable()
