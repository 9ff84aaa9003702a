"""Readers of the rows that metrics.jsonl gets: TensorBoard where it is installed, Weights & Biases where it is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from ..config import Config
from ..config.show import config_table
from ..core.errors import InputError
from ..core.log import logger

Tracker = Callable[[dict], None]


def trackers(config: Config, logdir: Path, *, wandb: bool, wandb_dir: Path | None = None) -> Tracker:
    """One function that hands a row to all of them."""
    found = [tensorboard_tracker(logdir), wandb_tracker(config, logdir, wandb_dir) if wandb else None]
    readers = [reader for reader in found if reader is not None]

    def track(row: dict) -> None:
        for reader in readers:
            reader(row)

    return track


def tensorboard_tracker(logdir: Path) -> Tracker | None:
    """Writes LOGDIR/tensorboard, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    writer = SummaryWriter(str(logdir / "tensorboard"))

    def track(row: dict) -> None:
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return track


def wandb_tracker(config: Config, logdir: Path, folder: Path | None) -> Tracker | None:
    """A function that logs a row, or None (with one warning) where wandb is not installed or no project is named."""
    settings = config.logging
    if settings.wandb_project is None:
        return None
    try:
        import wandb
    except ImportError:
        logger.warning("wandb is not installed: metrics go to metrics.jsonl and TensorBoard (pip install 'longlive[train]', or --disable-wandb)")
        return None
    name = Path(config.source).stem or logdir.name
    secret = config_table(config)
    secret["logging"].pop("wandb_key", None)
    try:
        if settings.wandb_key:
            wandb.login(key=settings.wandb_key, host=settings.wandb_host)
        run = wandb.init(project=settings.wandb_project, entity=settings.wandb_entity, name=name, config=secret, dir=str(folder or logdir))
    except Exception as error:  # no account, no network, no such entity: whatever the library says
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "run `wandb login`, set logging.wandb_key, or use --disable-wandb"
        raise InputError(f"Weights & Biases project {settings.wandb_project} cannot be opened ({reason}); {remedy}") from error

    def track(row: dict) -> None:
        run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    return track
