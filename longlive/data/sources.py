"""Sample number g, whatever it is read from. A `Planner` says which stream it is; a source fetches that stream as frames or as latents.

A source is a value that workers copy; `fetch(g)` depends on nothing but g and the files. A clip that cannot be read is recorded and the sample is planned
again with the next attempt number, so that the substitute too is a function of (seed, g): any number of workers and any resumed run meet the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..core.errors import InputError
from ..core.geometry import FPS, Geometry
from ..core.log import logger
from .manifest import UNREADABLE, Manifest, ManifestSample
from .samples import Broken, VideoSample
from .sampling import SamplingRules, Segment, draw_segments, filled_chunks, folder_of, frame_numbers, prompts_and_cuts, start_generator
from .video_reader import read_frames

NAMED = 5  # files that a message names


@dataclass(frozen=True)
class Stream:
    """What a sample shows: a folder and its segments, in order."""

    sample: ManifestSample
    segments: tuple[Segment, ...]

    @property
    def key(self) -> str:
        """A name of the stream: equal for equal frames, and for nothing else of this data set."""
        parts = [[self.sample.clips[s.clip].file, s.start, s.count] for s in self.segments]
        return hashlib.sha256(json.dumps([self.sample.name, parts]).encode("utf-8", "surrogatepass")).hexdigest()[:20]

    @property
    def title(self) -> str:
        """For messages: where the stream begins."""
        first = self.segments[0]
        return f"{self.sample.clips[first.clip].file} from frame {first.start}"


@dataclass(frozen=True)
class TooShort:
    """A folder that the rules cannot use."""

    name: str
    chunks: int


class Planner:
    """Which stream sample number g is. `samples` that cannot fill enough chunks are left out and listed in `short`."""

    def __init__(self, samples: Sequence[ManifestSample], rules: SamplingRules, seed: int):
        self.rules, self.seed = rules, seed
        filled = [filled_chunks(sample.clips, rules) for sample in samples]
        self.samples = tuple(sample for sample, count in zip(samples, filled) if count >= rules.least_chunks)
        self.short = tuple(TooShort(sample.name, count) for sample, count in zip(samples, filled) if count < rules.least_chunks)

    def __len__(self) -> int:
        """Samples of one pass over the data."""
        return len(self.samples)

    def sample(self, number: int, attempt: int = 0) -> ManifestSample:
        """The folder of sample `number`: each once per pass. Later attempts take the folders that follow in that pass."""
        turn, place = divmod(number, len(self))
        other = turn * len(self) + (place + attempt) % len(self)
        return self.samples[folder_of(self.seed, other, len(self), deterministic=self.rules.deterministic)]

    def stream(self, number: int, attempt: int = 0) -> Stream:
        sample = self.sample(number, attempt)
        return Stream(sample, draw_segments(sample.clips, self.rules, start_generator(self.seed, number, attempt)))

    def prompts_and_cuts(self, stream: Stream) -> tuple[tuple[str, ...], tuple[bool, ...]]:
        return prompts_and_cuts(stream.segments, [clip.caption for clip in stream.sample.clips], self.rules)


@dataclass(frozen=True)
class Fetched:
    """Sample or None (nothing could be read), and the broken clips that were met on the way."""

    sample: VideoSample | None
    broken: tuple[Broken, ...]


class Source(Protocol):
    """Where samples come from. `max_broken` is how many different broken clips a run may meet; `unreadable` those that are known beforehand."""

    max_broken: int
    unreadable: tuple[Broken, ...]

    def __len__(self) -> int:
        """Samples of one pass."""

    def fetch(self, number: int) -> Fetched: ...


class VideoSource:
    """Samples decoded from the files of a manifest."""

    def __init__(self, manifest: Manifest, rules: SamplingRules, geometry: Geometry, *, seed: int, max_broken: int = 0):
        self.root, self.geometry, self.max_broken = manifest.root, geometry, max_broken
        self.planner = Planner(manifest.samples, rules, seed)
        self.unreadable = tuple(Broken(problem.file, problem.reason, -1) for problem in manifest.of_kind(UNREADABLE))
        _report(manifest, self.planner)

    def __len__(self) -> int:
        return len(self.planner)

    def fetch(self, number: int) -> Fetched:
        broken: list[Broken] = []
        for attempt in range(self.max_broken + 1):
            stream = self.planner.stream(number, attempt)
            try:
                frames = self.frames(stream)
            except UnreadableClip as error:
                broken.append(Broken(error.file, str(error), number))
                continue
            prompts, cuts = self.planner.prompts_and_cuts(stream)
            sample = VideoSample(
                number=number, name=stream.title, prompts=prompts, cuts=cuts, valid_chunks=len(stream.segments), frames_THW3=frames
            )
            return Fetched(sample, tuple(broken))
        return Fetched(None, tuple(broken))

    def frames(self, stream: Stream) -> torch.Tensor:
        """The stream as uint8 [T, H, W, 3], its last frame repeated where it is padded. Each file is opened once. Raises UnreadableClip."""
        rules = self.planner.rules
        wanted: dict[int, list[int]] = {}
        for segment in stream.segments:
            wanted.setdefault(segment.clip, []).extend(frame_numbers(segment, stream.sample.clips[segment.clip]))
        total = sum(rules.frames_of(chunk) for chunk in range(rules.chunks))
        frames_THW3 = torch.empty(total, self.geometry.height, self.geometry.width, 3, dtype=torch.uint8)
        at = 0
        for clip, numbers in wanted.items():
            file = stream.sample.clips[clip].file
            try:
                frames_THW3[at : at + len(numbers)] = read_frames(self.root / file, numbers, self.geometry.height, self.geometry.width)
            except InputError as error:
                raise UnreadableClip(file, str(error)) from None
            at += len(numbers)
        frames_THW3[at:] = frames_THW3[at - 1]
        return frames_THW3


class UnreadableClip(InputError):
    """A clip whose frames could not be had; `file` is its place in the data set."""

    def __init__(self, file: str, message: str):
        super().__init__(message)
        self.file = file


def _report(manifest: Manifest, planner: Planner) -> None:
    """Says once what is left out, and refuses a data set of which nothing is left."""
    rules = planner.rules
    if not len(planner):
        longest = max((short.chunks for short in planner.short), default=0)
        if not planner.short:
            raise InputError(f"{manifest.root} holds no clip that can be used; `longlive data check {manifest.root}` lists what is wrong")
        need = f"{rules.least_chunks} chunks ({sum(rules.frames_of(c) for c in range(rules.least_chunks)) / FPS:.1f} s)"
        raise InputError(
            f"{manifest.root}: no folder fills {need}, the longest fills {longest}; lower data.image_or_video_shape[1], or set data.allow_padding: true"
        )
    left_out = [problem for problem in manifest.problems if problem.kind != UNREADABLE]
    if left_out:
        logger.warning("%s: %d files are left out: %s", manifest.root, len(left_out), few([f"{p.file} ({p.kind})" for p in left_out]))
    if planner.short:
        names = few([f"{short.name} ({short.chunks} of {rules.least_chunks} chunks)" for short in planner.short])
        logger.warning("%s: %d folders are too short: %s", manifest.root, len(planner.short), names)


def few(names: Sequence[str], most: int = NAMED) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
