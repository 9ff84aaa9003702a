"""Freed pieces that lie between held ones go back to the system."""

import sys

import psutil
import pytest

from longlive.engine.memory import trim_heap


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries return pages by themselves")
def test_scattered_free_memory_leaves_the_resident_set():
    process = psutil.Process()
    pieces = [bytearray(b"x" * 60_000) for _ in range(4000)]
    del pieces[::2]
    before = process.memory_info().rss
    trim_heap()
    assert before - process.memory_info().rss > 60e6
    assert len(pieces) == 2000
