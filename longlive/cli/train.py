"""`longlive train CONFIG --logdir DIR`: runs a trainer and reports on stderr, a line every few seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import OVERRIDES, split_overrides


def register(app: typer.Typer) -> None:
    """Adds the `train` command."""
    app.command(context_settings=OVERRIDES)(train)


def train(
    ctx: typer.Context,
    config: Annotated[str, typer.Argument(help="YAML file, such as configs/tiny/train_ar.yaml.")],
    logdir: Annotated[Path, typer.Option(help="Where metrics, weights and checkpoints go.")],
    disable_wandb: Annotated[bool, typer.Option("--disable-wandb", help="Do not log to Weights & Biases.")] = False,
    wandb_save_dir: Annotated[Path | None, typer.Option(help="Folder for the files of Weights & Biases.")] = None,
    no_auto_resume: Annotated[bool, typer.Option("--no-auto-resume", help="Start afresh even where LOGDIR holds a checkpoint.")] = False,
    no_save: Annotated[bool, typer.Option("--no_save", "--no-save", help="Write weights only, no checkpoint to resume from.")] = False,
) -> None:
    """Train a model; extra key=value words override the configuration. Run again with the same LOGDIR to go on where it stopped."""
    import json
    import logging

    from ..config import load_config
    from ..core.log import launch_rank
    from ..train import RunOptions, run

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("longlive").setLevel(logging.INFO)
    options = RunOptions(auto_resume=not no_auto_resume, save=not no_save, wandb=not disable_wandb, wandb_dir=wandb_save_dir)
    results = run(load_config(config, split_overrides(ctx.args)), logdir, options)
    if launch_rank()[0]:
        return
    if results:
        typer.echo(json.dumps(results))
    typer.echo(f"wrote {logdir}")
