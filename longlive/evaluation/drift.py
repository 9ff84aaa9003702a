"""How a film holds up over its length: every chunk is read by itself, and the figures are averaged over windows of time.

Works on a stream of chunks at constant memory, so that a film may be of any length. All motion of the world is periodic: every chunk of a
shot shows its attributes as well as the first one does. Where a figure is relative, it is so to the truth of the same chunk, which is
rendered when it is needed: 1 is as good as the truth. Where things stand is not told by a storyboard, so no pixel is held against a pixel.

Legend: T pixel frames, H, W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..core.errors import InputError
from ..core.geometry import FPS, chunk_pixel_range
from ..core.pixels import to_uint8
from ..world import perception
from ..world.judge import Judge, ShotReading, match, score_shot
from ..world.render import frame_parameters, render
from ..world.story import Character, ShotTruth, WorldStory
from ..world.vocabulary import COLOURS, PALETTE
from .picture import SEAM_REACH, measure, seam

PER_CHUNK = ("colour", "shape", "setting", "action", "camera")
SHOWN = (*PER_CHUNK, "identity")
LOOKS = ("tone", "sharpness", "motion", "saturation", "boundary")
CURVES = SHOWN + LOOKS
STANDS_STILL = 2e-4  # movement of a truth of which no motion is expected
MOST_MOTION = 2.0  # a single chunk counts at most this much, so that one wild chunk does not hide frozen ones


@dataclass(kw_only=True)
class DriftMeter:
    """Feed it the chunks of one film in order; `curve` makes rows of it. `every`: read only each n-th chunk, for very long films.

    identity: share of characters seen in the colour and shape in which they were first seen, in all shots after that one.
    tone: 1 at the told colour, falling to 0 at 85 levels of RGB distance, where a pixel is no longer that colour; 0 for who is not seen.
    sharpness, saturation: slope of the steepest edges and mean chroma, over those of the truth.
    motion: movement over that of the truth, at most 2; chunks whose truth stands still do not count.
    boundary: step at the chunk boundary over the steps around it, over the same of the truth; boundaries at cuts do not count.
    """

    judge: Judge
    story: WorldStory
    window: float = 20.0
    every: int = 1
    chunk: int = 0
    _sums: dict[int, dict[str, float]] = field(default_factory=dict)
    _counts: dict[int, dict[str, int]] = field(default_factory=dict)
    _first: dict[Character, tuple[int, tuple[str, str]]] = field(default_factory=dict)
    _tail: torch.Tensor | None = None

    def __post_init__(self):
        if self.window <= 0 or self.every < 1:
            raise InputError(f"a drift window of {self.window} seconds, every {self.every} chunks; use for example 20 seconds, every chunk")
        self._shots = self.story.shot_of_chunk

    @torch.no_grad()
    def feed(self, frames_THW3: torch.Tensor) -> None:
        """The uint8 frames of the next chunk."""
        frames = frames_THW3.to(self.judge.device)
        half = perception.half_size(frames)
        shot = self._shots[self.chunk]
        if self.chunk % self.every == 0:
            truth, reading = self.story.shots[shot], self.judge.read_shot(frames)
            inside = self.chunk > 0 and self._shots[self.chunk - 1] == shot
            looks = self._looks(frames, half, self._tail if inside else None)
            self._add(score_shot(truth, reading) | self._characters(truth, reading) | looks)
        self._tail = half[-SEAM_REACH:].clone()
        self.chunk += 1

    def _add(self, values: dict[str, float]) -> None:
        number = int(chunk_pixel_range(self.chunk)[0] / FPS // self.window)
        sums, counts = self._sums.setdefault(number, {}), self._counts.setdefault(number, {})
        for name, value in (("chunks", 1.0), *values.items()):
            sums[name] = sums.get(name, 0.0) + value
            counts[name] = counts.get(name, 0) + 1

    def _characters(self, truth: ShotTruth, reading: ShotReading) -> dict[str, float]:
        """`identity` and `tone` of one chunk; `identity` is missing when all of its characters are in their first shot."""
        pairs = dict(match(truth, reading))
        same, tones = [], []
        for r, role in enumerate(truth.roles):
            seen = reading.characters[pairs[r]] if r in pairs else None
            look = None if seen is None else (seen.colour, seen.shape)
            shot = self._shots[self.chunk]
            since, first = self._first.get(role.character, (shot, look))
            if since < shot:
                same.append(look == first)
            elif look is not None:
                self._first[role.character] = (since, first)
            away = math.inf if seen is None else math.dist(seen.rgb, PALETTE[COLOURS.index(role.character.colour)])
            tones.append(max(0.0, 1 - away / perception.PALETTE_REACH))
        values = {"tone": sum(tones) / len(tones)}
        return values | ({"identity": sum(same) / len(same)} if same else {})

    def _looks(self, frames_THW3: torch.Tensor, half_T3hw: torch.Tensor, before_T3hw: torch.Tensor | None) -> dict[str, float]:
        """`sharpness`, `saturation`, `motion` and `boundary` of one chunk; no `motion` where the truth stands still, no `boundary` at a cut.

        `before`: the last frames of the chunk before at half size, if it belongs to the same shot.
        """
        start, stop = chunk_pixel_range(self.chunk)
        reach = 0 if before_T3hw is None else len(before_T3hw)
        told = to_uint8(render(self._parameters(start - reach, stop), *frames_THW3.shape[1:3]))
        small = perception.half_size(told)
        film, truth = measure(frames_THW3, half_T3hw), measure(told[reach:], small[reach:])
        values = {"sharpness": film.edges / truth.edges, "saturation": film.chroma / truth.chroma}
        if truth.movement > STANDS_STILL:
            values["motion"] = min(MOST_MOTION, film.movement / truth.movement)
        if before_T3hw is not None:
            values["boundary"] = seam(before_T3hw, half_T3hw) / seam(small[:reach], small[reach:])
        return values

    def _parameters(self, start: int, stop: int) -> torch.Tensor:
        return frame_parameters(self.story, range(start, stop)).to(self.judge.device)

    def sums(self) -> dict[int, tuple[dict[str, float], dict[str, int]]]:
        """Per window number: sums of figures, and how many went into each."""
        return {number: (sums, self._counts[number]) for number, sums in self._sums.items()}


def curve(meters: Iterable[DriftMeter]) -> list[dict[str, float | None]]:
    """One row per window over several films: from_second, chunks, and the mean of each figure, None where no chunk of the window has it."""
    total: dict[int, tuple[dict[str, float], dict[str, int]]] = {}
    window = 0.0
    for meter in meters:
        window = meter.window
        for number, parts in meter.sums().items():
            for into, part in zip(total.setdefault(number, ({}, {})), parts):
                for name, value in part.items():
                    into[name] = into.get(name, 0) + value
    return [
        {
            "from_second": number * window,
            "chunks": sums["chunks"],
            **{name: sums[name] / counts[name] if name in counts else None for name in CURVES},
        }
        for number, (sums, counts) in sorted(total.items())
    ]


def losses(rows: list[dict[str, float | None]]) -> list[dict[str, float | str]]:
    """Per figure: name, first, last, lost (points of a hundred; for boundary the rise), between the first window and the last one that has it.

    A last window with less than half the chunks of the first is left out, for it would be chance.
    """
    whole = [row for row in rows if row["chunks"] >= rows[0]["chunks"] / 2]
    found = []
    for name in CURVES:
        values = [row[name] for row in whole if row[name] is not None]
        if values:
            sign = -1 if name == "boundary" else 1
            found.append({"name": name, "first": values[0], "last": values[-1], "lost": 100 * sign * (values[0] - values[-1])})
    return found
