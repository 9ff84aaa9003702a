"""What `longlive generate`, `inference.py` and `inference_sp.py` do once configuration and storyboards are read: films, alone or under torchrun.

With sp_size x dp_size above 1 processes make films in groups (`parallel.film_groups`). Otherwise every process takes its own prompts: prompt i belongs to
rank i % world size, for any number of both; no process group is needed then. Noise belongs to the prompt, so that a film depends on neither.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from math import gcd
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InputError
from ..core.log import launch_rank, logger
from ..core.story import Storyboard

ModelOption = Annotated[str | None, typer.Option("--model", help="tiny (where nothing else is said) or wan2.2-ti2v-5b.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings from a YAML file instead of --model.")]


def film_config(model: str | None, file: Path | None, overrides: list[str]):
    """The settings of `file`, else those that `model` (None: tiny) was released with. Raises InputError where the two name different models."""
    from ..config import default_config, load_config
    from ..models.spec import model_spec

    if file is None:
        return default_config(model or "tiny", overrides)
    config = load_config(file, overrides)
    if model is not None and model_spec(model) is not model_spec(config.model_kwargs.model_name):
        raise InputError(f"--model {model} and --config {file} name different models (the file: {config.model_kwargs.model_name}); give one of the two")
    return config


def group_sizes_of(config) -> list[int] | None:
    """Ranks of each group that makes films together; None where every process works alone. Raises ConfigError for another number of processes."""
    from ..parallel.film_groups import group_sizes

    if config.sp_size * config.dp_size == 1:
        return None
    shares = gcd(config.model_num_heads, config.chunk_frames)
    return group_sizes(launch_rank()[1], config.sp_size, config.dp_size, remainder=config.auto_sp_remainder, shares=shares)


def make_films(config, boards: Sequence[Storyboard], folder: Path, *, overwrite: bool, quiet: bool = False) -> None:
    """Makes the films that belong to this process. Rank 0 shows a progress bar unless `quiet`; each rank that writes names its files."""
    from ..engine.films import generate_films
    from ..engine.pipeline import choose_device
    from ..parallel.film_groups import film_mesh

    rank, world, _ = launch_rank()
    sizes = group_sizes_of(config)
    if sizes is None:
        joined = nullcontext(None)
    else:
        if rank:
            logger.setLevel(logging.WARNING)
        joined = film_mesh(sizes, choose_device(config).type)
    with joined as mesh:
        how = {"rank": rank, "world": world, "mesh": mesh, "overwrite": overwrite}
        if rank == 0 and not quiet:
            from .progress import FilmProgress

            with FilmProgress() as listener:
                generate_films(config, boards, folder, listener=listener, **how)
            return
        files = generate_films(config, boards, folder, **how)
        if not quiet:
            for made in files:
                typer.echo(str(made.film))
