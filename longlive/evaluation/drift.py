"""How a film holds up over its length: the judge reads every chunk by itself, and the scores are averaged over windows of time.

Works on a stream of chunks at constant memory, so that a film may be of any length. All motion of the world is periodic: every chunk of a
shot shows its attributes as well as the first one does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..core.errors import InputError
from ..core.geometry import FPS, chunk_pixel_range
from ..world.judge import Judge, score_shot
from ..world.story import WorldStory

PER_CHUNK = ("colour", "shape", "setting", "action", "camera")


@dataclass(kw_only=True)
class DriftMeter:
    """Feed it the chunks of one film in order; `rows()` is the curve. `every`: read only each n-th chunk, for very long films."""

    judge: Judge
    story: WorldStory
    window: float = 20.0
    every: int = 1
    chunk: int = 0
    _sums: dict[int, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self):
        if self.window <= 0 or self.every < 1:
            raise InputError(f"a drift window of {self.window} seconds, every {self.every} chunks; use for example 20 seconds, every chunk")
        self._shots = self.story.shot_of_chunk

    def feed(self, frames_THW3: torch.Tensor) -> None:
        """The uint8 frames of the next chunk."""
        if self.chunk % self.every == 0:
            truth = self.story.shots[self._shots[self.chunk]]
            scores = score_shot(truth, self.judge.read_shot(frames_THW3))
            bucket = self._sums.setdefault(int(chunk_pixel_range(self.chunk)[0] / FPS // self.window), {"chunks": 0.0})
            bucket["chunks"] += 1
            for name in PER_CHUNK:
                bucket[name] = bucket.get(name, 0.0) + scores[name]
        self.chunk += 1

    def sums(self) -> dict[int, dict[str, float]]:
        """Per window number: sums of scores and the count of chunks."""
        return self._sums


def curve(meters: Iterable[DriftMeter]) -> list[dict[str, float]]:
    """One row per window over several films: from_second, chunks, and the mean of each score."""
    total: dict[int, dict[str, float]] = {}
    window = 0.0
    for meter in meters:
        window = meter.window
        for number, bucket in meter.sums().items():
            into = total.setdefault(number, dict.fromkeys(bucket, 0.0))
            for name, value in bucket.items():
                into[name] += value
    return [
        {"from_second": number * window, "chunks": bucket["chunks"], **{name: bucket[name] / bucket["chunks"] for name in PER_CHUNK}}
        for number, bucket in sorted(total.items())
    ]
