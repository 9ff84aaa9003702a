"""`longlive world render|export`: films of the procedural world that training and judging use, with their captions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SeedOption = Annotated[int, typer.Option("--seed", help="Draws everything.")]
ChunksOption = Annotated[int, typer.Option("--chunks", help="Length of each film in chunks of 8 latent frames (29, then 32 pixel frames).")]
SplitOption = Annotated[str, typer.Option("--split", help="train, or held-out: combinations and wordings that training never shows.")]


def register(app: typer.Typer) -> None:
    """Adds the `world` group."""
    group = typer.Typer(help="The procedural video world.", no_args_is_help=True)
    group.command("export")(export)
    group.command("render")(render)
    app.add_typer(group, name="world")


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Gets video/SAMPLE/K.mp4 and caption/SAMPLE/K.json, one pair per shot.")],
    clips: Annotated[int, typer.Option("--clips", help="How many samples.")] = 16,
    seed: SeedOption = 0,
    chunks: ChunksOption = 12,  # as many as a sample of `tiny` has by its configurations
    min_shots: Annotated[int, typer.Option("--min-shots", help="Least shots of a sample.")] = 1,
    max_shots: Annotated[int, typer.Option("--max-shots", help="Most shots of a sample.")] = 4,
    split: SplitOption = "train",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write where samples are; those of the same number are replaced.")] = False,
) -> None:
    """Write a training set in the documented layout: real videos at 24 frames per second, and captions."""
    import json

    from rich.console import Console
    from rich.progress import track

    from ..core.errors import InputError
    from ..engine.naming import check_folder
    from ..engine.sinks import write_text
    from ..world.render import frame_parameters
    from ..world.story import sample_story

    if clips < 1:
        raise InputError(f"--clips {clips}: export at least one sample")
    taken = [folder for folder in (directory / "video", directory / "caption") if folder.exists()]
    if taken and not overwrite:
        raise InputError(f"{taken[0]} exists; give an empty folder or --overwrite")
    check_folder(directory, "give a folder that you may write to")
    stories = [sample_story(seed * 1_000_003 + index, chunks=chunks, shots=(min_shots, max_shots), split=split) for index in range(clips)]
    try:
        for index, story in track(list(enumerate(stories)), "rendering", console=Console(stderr=True)):
            videos, captions = (directory / kind / f"{index:06d}" for kind in ("video", "caption"))
            videos.mkdir(parents=True, exist_ok=True)
            captions.mkdir(parents=True, exist_ok=True)
            for number, (shot, frames) in enumerate(zip(story.shots, story.shot_frames)):
                _write_film(videos / f"{number}.mp4", frame_parameters(story, range(*frames)))
                write_text(captions / f"{number}.json", json.dumps({"caption": shot.caption}, ensure_ascii=False) + "\n")
            for old in (*videos.glob("*.mp4"), *captions.glob("*.json")):
                if old.stem.isdecimal() and int(old.stem) >= len(story.shots):  # a shot of the sample that was here before
                    old.unlink()
    except OSError as error:
        raise InputError(f"cannot write {directory} ({error.strerror}); give another folder") from None
    typer.echo(f"wrote {sum(len(s.shots) for s in stories)} shots of {clips} samples to {directory}")


def render(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="FILE.mp4: one film. FILE.png: a page of stories, a row per shot.")],
    clips: Annotated[int, typer.Option("--clips", help="How many stories are on a page.")] = 6,
    seed: SeedOption = 0,
    chunks: ChunksOption = 6,
    shots: Annotated[int, typer.Option("--shots", help="Shots of each story.")] = 3,
    split: SplitOption = "train",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
) -> None:
    """Look at the world: a film as it should be, or a page of stories."""
    from ..core.errors import InputError
    from ..engine.sinks import beside
    from ..world.gallery import gallery
    from ..world.render import frame_parameters
    from ..world.story import sample_story

    if path.suffix not in (".mp4", ".png"):
        raise InputError(f"{path}: end the name with .mp4 for a film or .png for a page")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; give another name or --overwrite")
    if clips < 1:
        raise InputError(f"--clips {clips}: show at least one story")
    count = clips if path.suffix == ".png" else 1
    stories = [sample_story(seed + index, chunks=chunks, shots=(shots, shots), split=split) for index in range(count)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            gallery(stories).save(beside(path), format="PNG")
            beside(path).replace(path)
        else:
            _write_film(path, frame_parameters(stories[0]))
            for shot in stories[0].shots:
                typer.echo(f"{shot.chunks} chunks: {shot.caption}")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); give another place") from None
    typer.echo(f"wrote {path}")


def _write_film(path: Path, params_NP) -> None:
    """Renders frames into a video that appears whole or not at all."""
    from ..core.pixels import to_uint8
    from ..engine.sinks import Mp4Sink
    from ..world.render import render as paint

    sink = Mp4Sink(path, crf=16, preset="fast")
    try:
        for part in params_NP.split(64):
            sink.write(to_uint8(paint(part)))
        sink.close()
    except BaseException:
        sink.abort()
        raise
