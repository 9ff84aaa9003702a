"""Image-to-video from folders of clips: ROOT/video/<film>/*.mp4 with ROOT/caption/<film>/<stem>.json.

A film starts from the first frame of its first captioned clip. Its prompts follow the clips in time: chunk by chunk, each takes the caption
of the clip that covers it; a new clip is a new shot (spec training §2.2, deterministic start). Only lengths are read here, no pictures.
"""

from __future__ import annotations

from pathlib import Path

from ..core.errors import InputError
from ..core.geometry import FPS, pixel_frames
from ..core.story import Shot, Storyboard
from .sampling import SamplingRules, walk
from .videos import clip_order, is_video, probe


def read_clip_folders(root: Path, chunks: int | None, settings) -> list[Storyboard]:
    """One storyboard per folder under ROOT/video, sorted by name. `settings` is a `prompts.SourceSettings`."""
    folders = sorted(p for p in (root / "video").iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise InputError(f"{root / 'video'} holds no folders of clips; give each film a folder")
    return [_film(folder, root / "caption" / folder.name, chunks, settings) for folder in folders]


def _film(folder: Path, captions: Path, chunks: int | None, settings) -> Storyboard:
    clips = captioned_clips(folder, captions)
    if not clips:
        raise InputError(f"{folder} holds no clip with a caption; write {captions}/<clip name>.json with {{\"caption\": \"...\"}}")
    runs = walk_clips([(probe(path), caption) for path, caption in clips], chunks, settings)
    filled = sum(count for _, count in runs)
    if not filled:
        raise InputError(f"{folder}: no clip fills a chunk of {pixel_frames(settings.chunk_frames)} frames at {FPS} fps; give a longer clip")
    if chunks is not None and filled < chunks:
        needed = f"{folder} fills {filled} of {chunks} chunks"
        if not settings.allow_padding:
            raise InputError(f"{needed}; give longer clips, or set allow_padding: true to go on with the last caption")
        if filled * settings.chunk_frames < settings.min_latent_frames:
            raise InputError(f"{needed}: {filled} x {settings.chunk_frames} < min_latent_frames({settings.min_latent_frames})")
    shots = tuple(Shot(prompt=caption, chunks=count) for caption, count in runs)
    return Storyboard(shots=shots, name=folder.name, image=str(clips[0][0]))


def captioned_clips(folder: Path, captions: Path) -> list[tuple[Path, str]]:
    """(clip, caption) pairs in the order of their numbers, names last; clips without a caption file are left out."""
    from .prompts import read_caption

    files = sorted((p for p in folder.iterdir() if p.is_file() and is_video(p)), key=lambda p: (clip_order(p.stem), p.name))
    return [(p, read_caption(captions / f"{p.stem}.json")) for p in files if (captions / f"{p.stem}.json").is_file()]


def walk_clips(clips: list, chunks: int | None, settings) -> list[tuple[str, int]]:
    """[(caption, chunks)] of the shots that the clips fill; `clips` holds (ClipInfo, caption). Stops after `chunks`."""
    rules = SamplingRules(
        chunks=chunks,
        chunk_frames=settings.chunk_frames,
        max_chunks_per_shot=settings.max_chunks_per_shot,
        uniform_prompt=settings.uniform_prompt,
    )
    runs: list[tuple[str, int]] = []
    for segment in walk([info for info, _ in clips], rules):
        caption = clips[segment.clip][1]
        runs = [*runs[:-1], (caption, runs[-1][1] + 1)] if runs and not segment.cut else [*runs, (caption, 1)]
    return runs
