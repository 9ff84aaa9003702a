"""`longlive demo`: films of the example storyboards by the small model, each with its contact sheet and the judge's scores."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InputError


def register(app: typer.Typer) -> None:
    """Adds the `demo` command to the application."""
    app.command("demo")(demo)


Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with storyboards (*.yaml) in the words of the small world.")]
FEW_STEPS = ("checkpoints.lora_ckpt=tiny-4steps", "adapter.type=lora", "merge_lora=true", "inference.sampling_steps=4", "inference.guidance_scale=1")
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where films and sheets go; those of an earlier demo are replaced.")]


def demo(folder: Folder = Path("examples"), output: Output = Path("outputs/demo")) -> None:
    """Render every storyboard of FOLDER with the shipped small model, distilled into four steps, and judge the films from their pixels."""
    from ..config import default_config
    from ..data.storyboard_file import read_storyboard
    from ..engine.films import generate_films
    from ..evaluation.contact_sheet import contact_sheet
    from ..evaluation.film import judge_film, sheet_rows
    from ..world.judge import Judge
    from ..world.reader import read_story
    from .progress import FilmProgress

    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise InputError(f"no storyboards (*.yaml) in {folder}; run it in the repository, or name a folder that holds some")
    boards = [read_storyboard(path) for path in paths]
    stories = [read_story(board) for board in boards]
    names = [board.title or path.stem for board, path in zip(boards, paths)]
    judge, started = Judge.load(), time.perf_counter()
    with FilmProgress() as listener:
        films = generate_films(default_config("tiny", FEW_STEPS), boards, output, overwrite=True, listener=listener, names=names)
    frames, seconds = sum(film.frames for film in films), time.perf_counter() - started
    typer.echo(f"{len(films)} film{'s' * (len(films) > 1)}, {frames} frames, made in {seconds:.0f} s with loading")
    for film in films:
        story = stories[film.index]
        typer.echo(f"contact sheet: {contact_sheet(film.film, sheet_rows(story), film.film.with_suffix('.png'))}")
        scores = judge_film(film.film, story, judge)
        typer.echo("judge: " + "  ".join(f"{name} {value:.2f}" for name, value in scores.items()))
