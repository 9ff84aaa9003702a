"""Full training state on disk: what a stopped run needs to go on exactly as if it had not stopped.

Layout (the documented one): LOGDIR/checkpoint_model_{step:06d}/model.pt with `generator`, `generator_ema`, `generator_optimizer`, `step`; ours
adds the clock, torch's random state, the trainer's name and the configuration. A folder appears only when it is complete.
Resuming (same run, everything restored) and starting from a checkpoint (`checkpoints.generator_ckpt`, weights only) are two things.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..core.errors import CheckpointError
from .optim import EMA

FILE = "model.pt"
_FOLDER = re.compile(r"checkpoint_model_(\d+)$")


@dataclass(frozen=True)
class RunState:
    """Where a run stands: optimiser steps done and seconds on the training clock."""

    step: int = 0
    elapsed: float = 0.0


def folders(logdir: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    found = [p for p in logdir.glob("checkpoint_model_*") if _FOLDER.match(p.name) and (p / FILE).is_file()]
    return sorted(found, key=lambda p: int(_FOLDER.match(p.name)[1]))


def save(
    logdir: Path, state: RunState, module: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, *, trainer: str, config: dict, keep: int = 0
) -> Path:
    """Writes one checkpoint and removes all but the newest `keep` (0: keeps all). Returns its folder."""
    folder = logdir / f"checkpoint_model_{state.step:06d}"
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    content = {
        "generator": {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()},
        "generator_optimizer": optimizer.state_dict(),
        "step": state.step,
        "elapsed": state.elapsed,
        "random": torch.get_rng_state(),
        "trainer": trainer,
        "config": config,
    }
    if ema.shadow:
        content["generator_ema"] = {name: tensor.contiguous() for name, tensor in ema.tensors().items()}
    torch.save(content, partial / FILE)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    for old in folders(logdir)[:-keep] if keep else []:
        shutil.rmtree(old)
    return folder


def resume(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, *, trainer: str) -> RunState:
    """Restores everything that `save` wrote, in place. Raises CheckpointError for a file of another trainer, shape or kind."""
    path = folder / FILE
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove its folder, or start afresh with --no-auto-resume") from error
    if not isinstance(content, dict) or content.get("trainer") != trainer:
        kind = content.get("trainer") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} was written by trainer {kind!r}, not {trainer!r}; use another --logdir or --no-auto-resume")
    try:
        module.load_state_dict(content["generator"])
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds another model: {str(error).splitlines()[1].strip()}; use another --logdir or --no-auto-resume") from error
    optimizer.load_state_dict(content["generator_optimizer"])
    if ema.shadow:
        ema.load(content.get("generator_ema", content["generator"]))
    torch.set_rng_state(content["random"])
    return RunState(content["step"], content["elapsed"])
