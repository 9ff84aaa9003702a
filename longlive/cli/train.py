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
    logdir: Annotated[Path | None, typer.Option(help="Where metrics, weights and checkpoints go; not needed for a dry run.")] = None,
    disable_wandb: Annotated[bool, typer.Option("--disable-wandb", help="Do not log to Weights & Biases.")] = False,
    wandb_save_dir: Annotated[Path | None, typer.Option(help="Folder for the files of Weights & Biases.")] = None,
    no_auto_resume: Annotated[bool, typer.Option("--no-auto-resume", help="Start afresh even where LOGDIR holds a checkpoint.")] = False,
    no_save: Annotated[bool, typer.Option("--no_save", "--no-save", help="Write weights only, no checkpoint to resume from.")] = False,
    no_visualize: Annotated[bool, typer.Option("--no_visualize", "--no-visualize", help="No evaluation during training.")] = False,
    generate_before_train: Annotated[bool, typer.Option("--generate-before-train", help="Evaluate once and stop.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check configuration and data, estimate memory, take one step; write nothing.")] = False,
) -> None:
    """Train a model; extra key=value words override the configuration. Run again with the same LOGDIR to go on where it stopped."""
    import json

    from ..config import load_config
    from ..core.errors import InputError
    from ..core.log import launch_rank
    from ..train import RunOptions, run

    report_to_stderr()
    settings = load_config(config, split_overrides(ctx.args) + (["evaluation.interval=0"] if no_visualize else []))
    if dry_run:
        rehearsal(settings)
        return
    if logdir is None:
        raise InputError("--logdir is missing; give the folder that gets metrics, weights and checkpoints, or ask for a --dry-run")
    options = RunOptions(
        auto_resume=not no_auto_resume, save=not no_save, evaluate_only=generate_before_train, wandb=not disable_wandb, wandb_dir=wandb_save_dir
    )
    results = run(settings, logdir, options)
    if launch_rank()[0]:
        return
    if results:
        typer.echo(json.dumps(results))
    typer.echo(f"wrote {logdir}")


def report_to_stderr() -> None:
    """Progress of a training as lines with the time."""
    import logging

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("longlive").setLevel(logging.INFO)


def rehearsal(settings) -> None:
    """A dry run; the first process prints its report."""
    from ..core.log import launch_rank
    from ..train import rehearse

    report = rehearse(settings)
    if launch_rank()[0] == 0:
        typer.echo("\n".join(report.lines()))
