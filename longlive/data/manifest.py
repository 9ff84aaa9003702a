"""What a folder of videos holds: ROOT/video/<sample>/*.mp4 with ROOT/caption/<sample>/<same stem>.json, indexed once (spec training §2.1).

Folders are sorted by name and clips by number, so that every host sees the same order. Frame counts, rates and sizes are read from the files once and kept
in a cache beside the data (or where the caller says); an entry counts as long as size and time of its video and caption are the same. What cannot be
used is kept too, with the reason: nothing is left out in silence.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..core.errors import InputError
from ..core.files import share
from ..core.log import logger
from .prompts import read_caption
from .videos import clip_order, is_video, probe

CACHE_NAME = ".longlive-manifest.json"
VERSION = 1
PROBES = 16  # files opened at a time: opening waits for the disk, not for the processor
UNREADABLE, NO_CAPTION, NO_VIDEO = "unreadable", "no caption", "no video"


@dataclass(frozen=True)
class ManifestClip:
    """One video with its caption. `file` is relative to the root, with /."""

    file: str
    caption: str
    frames: int
    fps: float
    width: int
    height: int

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


@dataclass(frozen=True)
class ManifestSample:
    """One folder: its clips in the order in which they are shown."""

    name: str
    clips: tuple[ManifestClip, ...]


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used. `kind` is one of UNREADABLE, NO_CAPTION, NO_VIDEO."""

    kind: str
    file: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """Samples with at least one usable clip, and everything that was left out."""

    root: Path
    samples: tuple[ManifestSample, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def digest(self) -> str:
        """A name of the content, the same on every host that holds the same files: ranks compare it."""
        content = json.dumps([asdict(sample) for sample in self.samples], ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def of_kind(self, kind: str) -> list[Problem]:
        return [problem for problem in self.problems if problem.kind == kind]


@dataclass(frozen=True)
class _Found:
    """One video in the tree. `stamp`: size and time of it and of its caption (None: there is none, or a link that leads nowhere)."""

    sample: str
    video: str
    caption: str
    stamp: list = field(compare=False)


def index_dataset(root: str | Path, cache: str | Path | None = None, on_probe: Callable[[int, int], None] | None = None) -> Manifest:
    """The manifest of a data set. Opens only the files that are new or changed since the cache was written.

    `cache`: a file; None: CACHE_NAME in the root. A root that cannot be written to is indexed anew each time, with one warning.
    `on_probe(done, total)` hears of every file that is opened. Raises InputError where there is no such layout.
    """
    root = Path(root)
    found = list(_videos(root))
    place = Path(cache) if cache is not None else root / CACHE_NAME
    known = _read_cache(place)
    entries, todo = {}, []
    for one in found:
        entry = known.get(one.video)
        if entry is not None and entry["stamp"] == one.stamp:
            entries[one.video] = entry
        else:
            todo.append(one)
    with ThreadPoolExecutor(PROBES) as pool:
        for done, (one, entry) in enumerate(zip(todo, pool.map(lambda one: _entry(root, one), todo)), 1):
            entries[one.video] = entry
            if on_probe is not None:
                on_probe(done, len(todo))
    if todo or len(known) != len(entries):
        _write_cache(place, entries, must=cache is not None)
    return _manifest(root, found, entries)


def _manifest(root: Path, found: list[_Found], entries: dict[str, dict]) -> Manifest:
    folders: dict[str, list[ManifestClip]] = {}
    problems = []
    for one in found:
        entry = entries[one.video]
        if entry["problem"]:
            problems.append(Problem(*entry["problem"]))
        else:
            folders.setdefault(one.sample, []).append(ManifestClip(one.video, *entry["clip"]))
    problems += [Problem(NO_VIDEO, caption, "no video of this name") for caption in _lonely_captions(root, found)]
    return Manifest(root, tuple(ManifestSample(name, tuple(clips)) for name, clips in folders.items()), tuple(problems))


def _folders(place: Path) -> list[os.DirEntry]:
    with os.scandir(place) as entries:
        return sorted((e for e in entries if e.is_dir() and not e.name.startswith(".")), key=lambda e: e.name)


def _files(place: Path) -> dict[str, os.DirEntry]:
    """The files of a folder, and links that lead nowhere."""
    if not place.is_dir():
        return {}
    with os.scandir(place) as entries:
        return {e.name: e for e in entries if not e.name.startswith(".") and (_leads_nowhere(e) or e.is_file())}


def _leads_nowhere(entry: os.DirEntry) -> bool:
    """Whether this is a link to nothing, or to itself."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def _videos(root: Path) -> Iterator[_Found]:
    if not (root / "video").is_dir():
        other = "is not a folder" if root.exists() else "does not exist"
        inside = f"{root} holds no video/ folder" if root.is_dir() else f"{root} {other}"
        raise InputError(f'{inside}; a data set is ROOT/video/<sample>/0.mp4 with ROOT/caption/<sample>/0.json holding {{"caption": "..."}}')
    for folder in _folders(root / "video"):
        captions = _files(root / "caption" / folder.name)
        files = _files(Path(folder.path))
        videos = [Path(name) for name in files if is_video(Path(name))]
        for name in sorted(videos, key=lambda p: (clip_order(p.stem), p.name)):
            video, caption = f"video/{folder.name}/{name}", f"{name.stem}.json"
            stamp = [*_stamp(files[name.name]), *_stamp(captions.get(caption))]
            yield _Found(folder.name, video, f"caption/{folder.name}/{caption}", stamp)


def _stamp(entry: os.DirEntry | None) -> tuple[int, int] | tuple[None, None]:
    if entry is None or _leads_nowhere(entry):
        return None, None
    status = os.stat(entry.path)
    return status.st_size, status.st_mtime_ns


def _lonely_captions(root: Path, found: list[_Found]) -> Iterator[str]:
    taken = {one.caption for one in found}
    if (root / "caption").is_dir():
        for folder in _folders(root / "caption"):
            names = (f"caption/{folder.name}/{name}" for name in sorted(_files(Path(folder.path))) if name.endswith(".json") and name != "global.json")
            yield from (name for name in names if name not in taken)


def _entry(root: Path, one: _Found) -> dict:
    """The cache entry of one video: what it is, or why it cannot be used."""
    entry = {"stamp": one.stamp, "problem": None, "clip": None}
    kind, file = NO_CAPTION, one.video
    try:
        if one.stamp[0] is None:
            kind = NO_VIDEO
            raise InputError(f"{one.video} is a link that leads nowhere ({os.readlink(root / one.video)})")
        if one.stamp[2] is None:
            nowhere = f", a link that leads nowhere ({os.readlink(root / one.caption)})" if (root / one.caption).is_symlink() else ""
            raise InputError(f"expected {one.caption}{nowhere}")
        caption = read_caption(root / one.caption)
        kind = UNREADABLE
        info = probe(root / one.video)
        entry["clip"] = [caption, info.frames, info.fps, info.width, info.height]
    except InputError as error:
        entry["problem"] = [kind, file, str(error).replace(f"{root}{os.sep}", "")]
    return entry


def _read_cache(place: Path) -> dict[str, dict]:
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        return content["clips"] if content["version"] == VERSION else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("%s is not a readable manifest; the data are indexed again", place)
        return {}


def _write_cache(place: Path, entries: dict[str, dict], must: bool) -> None:
    """Several processes may write at a time: each has a temporary file of its own, and the last whole one stays."""
    temporary = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, prefix=place.name, suffix=".tmp", delete=False, encoding="utf-8") as file:
            temporary = file.name
            json.dump({"version": VERSION, "clips": entries}, file)
        share(Path(temporary))
        os.replace(temporary, place)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if must:
            raise InputError(f"cannot write the manifest {place} ({error.strerror}); give data.manifest_path a file in a writable folder") from None
        logger.warning("cannot keep the manifest beside the data (%s: %s); give data.manifest_path a file elsewhere to index once", place, error.strerror)
