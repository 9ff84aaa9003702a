"""Is this a data set that training can use? Counts, lengths, sizes, rates, and every file that cannot be used with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from statistics import median

from ..core.errors import InputError
from ..core.geometry import Geometry
from .manifest import UNREADABLE, Manifest, ManifestClip, ManifestSample, Problem
from .sampling import SamplingRules, filled_chunks
from .video_reader import count_frames

DECODERS = 4
STRETCH = 0.02  # a change of the ratio of sides below this cannot be seen


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What `check_dataset` found. Lengths in seconds as (least, median, most); `short` folders as (name, chunks that they fill)."""

    root: str
    folders: int
    usable: int
    clips: int
    hours: float
    clip_seconds: tuple[float, float, float]
    folder_chunks: tuple[float, float, float]
    caption_words: tuple[float, float, float]
    rates: dict[str, int]
    sizes: dict[str, int]
    stretched: int
    chunks_needed: int
    short: tuple[tuple[str, int], ...]
    problems: tuple[Problem, ...]
    decoded: bool
    digest: str
    kinds: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict:
        return asdict(self)


def check_dataset(
    manifest: Manifest, rules: SamplingRules, size: Geometry | None = None, *, decode: bool = False, on_clip: Callable[[], None] | None = None
) -> DataReport:
    """The report of a manifest under sampling rules. `rules.chunks` None: a folder needs one chunk. `size`: what samples are stretched to.

    `decode` reads every frame of every clip and finds damage inside files; `on_clip` hears of each.
    """
    if decode:
        manifest = _decoded(manifest, on_clip or (lambda: None))
    clips = [clip for sample in manifest.samples for clip in sample.clips]
    filled = [(sample.name, filled_chunks(sample.clips, rules)) for sample in manifest.samples]
    longest = [filled_chunks(sample.clips, replace(rules, chunks=None)) for sample in manifest.samples]
    short = tuple((name, count) for name, count in filled if count < rules.least_chunks)
    return DataReport(
        root=str(manifest.root),
        folders=len(manifest.samples),
        usable=len(filled) - len(short),
        clips=len(clips),
        hours=sum(clip.seconds for clip in clips) / 3600,
        clip_seconds=_spread([clip.seconds for clip in clips]),
        folder_chunks=_spread(longest),
        caption_words=_spread([len(clip.caption.split()) for clip in clips]),
        rates=_counts(f"{clip.fps:.6g}" for clip in clips),
        sizes=_counts(f"{clip.height}x{clip.width}" for clip in clips),
        stretched=sum(_is_stretched(clip, size) for clip in clips) if size else 0,
        chunks_needed=rules.least_chunks,
        short=short,
        problems=manifest.problems,
        decoded=decode,
        digest=manifest.digest,
        kinds=_counts(problem.kind for problem in manifest.problems),
    )


def _decoded(manifest: Manifest, on_clip: Callable[[], None]) -> Manifest:
    """The manifest without the clips that do not play to their end."""
    clips = [clip for sample in manifest.samples for clip in sample.clips]
    damaged: dict[str, Problem] = {}
    with ThreadPoolExecutor(DECODERS) as pool:
        for clip, problem in zip(clips, pool.map(lambda clip: _play(manifest, clip), clips)):
            on_clip()
            if problem is not None:
                damaged[clip.file] = problem
    kept = (ManifestSample(s.name, tuple(clip for clip in s.clips if clip.file not in damaged)) for s in manifest.samples)
    return replace(manifest, samples=tuple(s for s in kept if s.clips), problems=(*manifest.problems, *damaged.values()))


def _play(manifest: Manifest, clip: ManifestClip) -> Problem | None:
    try:
        frames = count_frames(manifest.root / clip.file)
    except InputError as error:
        return Problem(UNREADABLE, clip.file, str(error))
    return Problem(UNREADABLE, clip.file, f"it plays {frames} frames and its header says {clip.frames}") if frames < clip.frames else None


def _is_stretched(clip: ManifestClip, size: Geometry) -> bool:
    return bool(clip.width and clip.height) and abs(clip.width * size.height / (clip.height * size.width) - 1) > STRETCH


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return (min(values), median(values), max(values)) if values else (0, 0, 0)


def _counts(words) -> dict[str, int]:
    return dict(Counter(words).most_common())
