"""Host memory of long runs on a CPU.

Activations come and go in all sizes. The C library keeps freed pieces in its heap, and over thousands of chunks they scatter: the resident set creeps
up although nothing is held. `trim_heap` hands the free pages back, so that a film of ten minutes needs what a film of one minute needs.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None where the C library has no such call (their allocators return pages by themselves)."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc.malloc_trim if hasattr(libc, "malloc_trim") else None


def trim_heap() -> None:
    """Returns free heap pages of this process to the system. Milliseconds; nothing that is held moves."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
