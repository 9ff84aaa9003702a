"""`longlive storyboard check|plan`: is a storyboard right, and what will it take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import OVERRIDES, split_overrides
from .filming import ConfigOption, ModelOption, film_config

group = typer.Typer(no_args_is_help=True, help="Check and plan storyboard files.")

File = Annotated[Path, typer.Argument(metavar="FILE", help="Storyboard file (YAML).")]


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="storyboard")


@group.command()
def check(file: File) -> None:
    """Say ok and give advice by the prompt guide, or name the line that is wrong (exit code 2)."""
    from ..data.storyboard_advice import advise
    from ..data.storyboard_file import read_storyboard

    board = read_storyboard(file)
    for line in advise(board, by_length=not in_the_small_world(board)):
        typer.echo(f"advice: {line}")
    count = len(board.shots)
    typer.echo(f"ok: {file}, {count} shot{'s' if count > 1 else ''}")


def in_the_small_world(board) -> bool:
    """Whether all shots are told in the words that `tiny` knows: its sentences are short, and the prompt guide is not for them."""
    from ..core.errors import InputError
    from ..world.reader import read_shot

    known = []
    try:
        for shot in board.shots:
            known += [role.character for role in read_shot(shot.prompt, known=known).roles]
    except InputError:
        return False
    return True


@group.command("plan", context_settings=OVERRIDES)
def plan_command(
    ctx: typer.Context,
    file: File,
    model: ModelOption = None,
    config_file: ConfigOption = None,
) -> None:
    """Print shots, chunks, frames and seconds, and about how much memory and time the film takes here."""
    from ..core.geometry import FPS, pixel_frames
    from ..core.story import plan
    from ..data.storyboard_file import read_storyboard
    from ..engine.estimate import estimate
    from ..engine.pipeline import choose_device, choose_dtype
    from ..engine.sources import boards_for_generate

    config = film_config(model, config_file, split_overrides(ctx.args))
    read_storyboard(file, config.chunk_frames)
    (board,) = boards_for_generate(config, file)
    plans, size = plan(board), config.chunk_frames
    typer.echo(f"{'shot':>4} {'chunks':>6} {'frames':>13} {'seconds':>13}  prompt")
    start = 0
    for number, shot in enumerate(board.shots):
        first, last = pixel_frames(start * size), pixel_frames((start + shot.chunks) * size)
        text = " ".join(shot.prompt.split())
        typer.echo(
            f"{number + 1:>4} {shot.chunks:>6} {f'{first}-{last - 1}':>13} {f'{first / FPS:.1f}-{last / FPS:.1f}':>13}  "
            f"{text if len(text) <= 80 else text[:77] + '...'}"
        )
        start += shot.chunks
    frames, latents = pixel_frames(len(plans) * size), len(plans) * size
    count = f"{len(board.shots)} shot{'s' if len(board.shots) > 1 else ''}, {len(plans)} chunk{'s' if len(plans) > 1 else ''}"
    typer.echo(f"{count}, {latents} latent frames, {frames} frames = {frames / FPS:.1f} s at {FPS} fps")
    device = choose_device(config)
    guess = estimate(config, board, len(plans), device, choose_dtype(config, device))
    typer.echo(f"estimated on this machine ({device}): {guess.memory_bytes / 2**30:.1f} GiB of memory, {guess.words()} of time")
