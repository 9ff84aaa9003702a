"""Weights & Biases as one more reader of the rows that metrics.jsonl gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..config import Config
from ..config.show import config_table
from ..core.log import logger


def wandb_tracker(config: Config, logdir: Path, folder: Path | None) -> Callable[[dict], None] | None:
    """A function that logs a row, or None (with one warning) where wandb is not installed or no project is named."""
    settings = config.logging
    if settings.wandb_project is None:
        return None
    try:
        import wandb
    except ImportError:
        logger.warning("wandb is not installed: metrics go to metrics.jsonl only (pip install 'longlive[train]', or --disable-wandb)")
        return None
    if settings.wandb_key:
        wandb.login(key=settings.wandb_key, host=settings.wandb_host)
    name = Path(config.source).stem or logdir.name
    secret = config_table(config)
    secret["logging"].pop("wandb_key", None)
    run = wandb.init(project=settings.wandb_project, entity=settings.wandb_entity, name=name, config=secret, dir=str(folder or logdir))

    def track(row: dict) -> None:
        run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    return track
