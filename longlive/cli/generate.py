"""`longlive generate`: from a sentence, a file or a folder to films, with a progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import OVERRIDES, split_overrides
from .filming import ConfigOption, ModelOption, film_config, group_sizes_of, make_films


def register(app: typer.Typer) -> None:
    app.command("generate", context_settings=OVERRIDES)(generate)


def generate(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A sentence, a .txt file, a folder of captions or images, a storyboard (.yaml).")],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for the films; default output_folder.")] = None,
    model: ModelOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace films that exist.")] = False,
    config_file: ConfigOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Make films. Trailing key=value words change the settings: inference.sampling_steps=4 logging.seed=7 num_output_frames=64.

    Under torchrun processes share the films, and with sp_size=N groups of N make each film together.
    Each film is an .mp4 with its prompts (_prompts.txt) and a receipt (.json) beside it. Ctrl-C finishes the chunk at hand and closes the film.
    """
    from ..config import availability
    from ..engine.sources import boards_for_generate

    config = film_config(model, config_file, split_overrides(ctx.args))
    availability(config, "generate")
    group_sizes_of(config)
    boards = boards_for_generate(config, source)
    folder = output or Path(config.output_folder)
    make_films(config, boards, folder, overwrite=overwrite, quiet=quiet)
