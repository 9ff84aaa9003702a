"""LongLive: long, multi-shot video generation, chunk by chunk.

    from longlive import Pipeline, Request, Shot, Storyboard, default_config

    pipeline = Pipeline.load(default_config("tiny"))
    board = Storyboard(shots=(Shot(prompt="A red circle bounces on a meadow.", chunks=4),))
    with pipeline.session(Request(storyboards=(board,))) as session:
        for chunk in session:
            chunk.frames  # uint8 [1, T, H, W, 3]

The names below are imported when they are first used, so that `import longlive` and `longlive --help` stay quick.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    "ChunkResult": "engine.session",
    "Pipeline": "engine.pipeline",
    "Request": "engine.session",
    "Session": "engine.session",
    "Shot": "core.story",
    "Storyboard": "core.story",
    "default_config": "config",
    "load_config": "config",
    "read_storyboard": "data.storyboard_file",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'longlive' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
