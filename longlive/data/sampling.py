"""Which frames a training sample shows: the documented rules of folders of clips, as pure functions (spec training §2.2).

A sample is a stream of whole chunks out of one folder. Chunk 0 takes 1 + 4(n-1) frames at 24 fps, each later one 4n (n latent frames a chunk), so that
a cut always lands on a latent boundary. Chunks are filled moving only forward: through a clip, then from the beginning of the next one. A cut is
where a segment comes from another clip than the one before, or follows a virtual cut: after `max_chunks_per_shot` chunks of one clip, one
second of it is skipped.

Sample number g of a run is a function of (seed, g) alone: folder = permutation of pass g // N, place g % N; the start is drawn by (seed, g). Neither
ranks nor workers nor what was drawn before take part, so that a resumed run draws what the stopped one would have drawn.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from ..core.geometry import CHUNK_FRAMES, FPS, TEMPORAL_STRIDE, pixel_frames
from ..core.story import SCENE_CUT_PREFIX

STARTS_OF_A_CLIP = 50


class Clip(Protocol):
    """What the rules ask of a clip: its frames, and how many of them are shown in a second."""

    frames: int
    fps: float


@dataclass(frozen=True, kw_only=True)
class SamplingRules:
    """`chunks` None: as many as the clips fill. `deterministic`: always start at frame 0 of the first clip. The others are the `data` keys of their names."""

    chunks: int | None
    chunk_frames: int = CHUNK_FRAMES
    max_chunks_per_shot: int = 0
    allow_padding: bool = False
    min_latent_frames: int = 0
    uniform_prompt: bool = False
    scene_cut_prefix: str = SCENE_CUT_PREFIX
    deterministic: bool = False

    def frames_of(self, chunk: int) -> int:
        """Pixel frames at 24 fps of chunk number `chunk`: 29 for the first, 32 for others (8 latent frames a chunk)."""
        return TEMPORAL_STRIDE * self.chunk_frames if chunk else pixel_frames(self.chunk_frames)

    @property
    def least_chunks(self) -> int:
        """Chunks that a folder must fill to be used."""
        if not self.allow_padding or self.chunks is None:
            return self.chunks or 1
        return max(1, -(-self.min_latent_frames // self.chunk_frames))


@dataclass(frozen=True)
class Segment:
    """One chunk: `count` frames at 24 fps of clip number `clip`, from its frame `start`. `cut`: another shot begins here."""

    clip: int
    start: int
    count: int
    cut: bool


def frame_numbers(segment: Segment, clip: Clip) -> list[int]:
    """The frames of the file that a segment shows, by time, never beyond the last one."""
    return [min(round(segment.start + i * clip.fps / FPS), clip.frames - 1) for i in range(segment.count)]


def fits(clip: Clip, start: int, count: int) -> bool:
    """Whether `count` frames at 24 fps lie in the clip from its frame `start`."""
    return round(start + (count - 1) * clip.fps / FPS) < clip.frames


def walk(clips: Sequence[Clip], rules: SamplingRules, clip: int = 0, start: int = 0) -> tuple[Segment, ...]:
    """The segments that the clips fill from a start on, at most `rules.chunks`."""
    segments: list[Segment] = []
    inside, fresh = 0, True
    while clip < len(clips) and (rules.chunks is None or len(segments) < rules.chunks):
        count = rules.frames_of(len(segments))
        if not fits(clips[clip], start, count):
            if rules.uniform_prompt and segments:
                break
            clip, start, inside, fresh = clip + 1, 0, 0, True
        elif not fresh and rules.max_chunks_per_shot and inside >= rules.max_chunks_per_shot:
            start, inside, fresh = start + round(clips[clip].fps), 0, True
        else:
            segments.append(Segment(clip, start, count, fresh and bool(segments)))
            start, inside, fresh = round(start + count * clips[clip].fps / FPS), inside + 1, False
    return tuple(segments)


def feasible_starts(clips: Sequence[Clip], rules: SamplingRules) -> tuple[range, ...]:
    """For each clip the start frames from which all of `rules.chunks` can be filled, virtual cuts included.

    Starts lie on a grid of about 50 a clip. A later start never fills more than an earlier one of the same clip, so that they are the first ones of the
    grid and a bisection finds how many.
    """
    found = []
    for number, clip in enumerate(clips):
        grid = _grid(clip, rules.frames_of(0))
        count = bisect.bisect_left(grid, True, key=lambda start, number=number: len(walk(clips, rules, number, start)) < rules.chunks)
        found.append(grid[:count])
    return tuple(found)


def _grid(clip: Clip, count: int) -> range:
    last = clip.frames - 1
    while last >= 0 and not fits(clip, last, count):
        last = min(last - 1, clip.frames - 1 - int((count - 1) * clip.fps / FPS))
    return range(0, last + 1, max(1, last // STARTS_OF_A_CLIP))


def filled_chunks(clips: Sequence[Clip], rules: SamplingRules) -> int:
    """Chunks of the best stream that may be drawn from these clips."""
    if rules.uniform_prompt and not rules.deterministic and rules.chunks is not None and any(feasible_starts(clips, rules)):
        return rules.chunks
    return len(walk(clips, rules))


def draw_segments(clips: Sequence[Clip], rules: SamplingRules, rng: random.Random) -> tuple[Segment, ...]:
    """One stream out of a folder: fewer segments than `rules.chunks` where it must be padded."""
    if not rules.deterministic:
        starts = feasible_starts(clips, rules)
        total = sum(map(len, starts))
        if total:
            choice = below(rng, total)
            for number, grid in enumerate(starts):
                if choice < len(grid):
                    return walk(clips, rules, number, grid[choice])
                choice -= len(grid)
    return walk(clips, rules)


def prompts_and_cuts(segments: Sequence[Segment], captions: Sequence[str], rules: SamplingRules) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """Prompt and cut flag of every chunk; `captions` are those of the clips. Padded chunks repeat the last caption and are no cuts."""
    cuts = [segment.cut for segment in segments]
    words = [captions[segment.clip] for segment in segments]
    missing = (rules.chunks or len(segments)) - len(segments)
    cuts, words = cuts + [False] * missing, words + words[-1:] * missing
    return tuple((rules.scene_cut_prefix if cut else "") + word for cut, word in zip(cuts, words)), tuple(cuts)


# ---------------------------------------------------------------- numbers


def below(rng: random.Random, count: int) -> int:
    """A number in [0, count), from `random()`, whose sequence no version of Python changes."""
    return int(rng.random() * count)


@lru_cache(maxsize=2)
def shuffled(seed: int, turn: int, count: int) -> tuple[int, ...]:
    """The order of `count` folders in pass number `turn` of the data: each once."""
    rng = random.Random(f"longlive order {seed} {turn}")
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = below(rng, last + 1)
        order[last], order[other] = order[other], order[last]
    return tuple(order)


def folder_of(seed: int, number: int, count: int, *, deterministic: bool = False) -> int:
    """The folder of sample number `number`: `number // count` passes were complete before it. `deterministic`: in sorted order."""
    turn, place = divmod(number, count)
    return place if deterministic else shuffled(seed, turn, count)[place]


def start_generator(seed: int, number: int, attempt: int) -> random.Random:
    """Draws the start of sample number `number`; `attempt` counts the broken clips that were met for it."""
    return random.Random(f"longlive sample {seed} {number} {attempt}")
