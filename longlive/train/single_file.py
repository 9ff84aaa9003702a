"""The documented checkpoint of one file, LOGDIR/checkpoint_model_{step:06d}/model.pt, which older runs wrote: read, never written.

Entries: `generator`, `generator_optimizer`, `step`, `generator_ema` where there is one (spec training §1.5); ours added `elapsed`, `random`, `trainer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..core.errors import CheckpointError
from ..models.files import open_file
from ..models.keymaps import strip_wrappers
from ..parallel.fsdp import like
from .checkpoint import SINGLE_FILE, RunState, damaged
from .optim import EMA
from .state import Optimizers, numbered_state, set_optimizer


@torch.no_grad()
def resume_single_file(folder: Path, module: nn.Module, optimizer: Optimizers, ema: EMA, *, trainer: str) -> RunState:
    """Restores everything that the file holds, in place, on any number of ranks. Raises CheckpointError for another trainer, model or kind."""
    path = folder / SINGLE_FILE
    try:
        content, _, _ = open_file(path)
    except CheckpointError as error:
        raise damaged(folder, str(error)) from error
    missing = [entry for entry in ("generator", "generator_optimizer", "step") if entry not in content]
    if missing:
        raise CheckpointError(f"{path} has no {missing[0]}: it holds weights, not a run; give it as checkpoints.generator_ckpt with another --logdir")
    if content.get("trainer", trainer) != trainer:
        raise CheckpointError(f"{path} was written by trainer {content['trainer']!r}, not {trainer!r}; use another --logdir or --no-auto-resume")
    generator = _bare(content["generator"])
    targets = module.state_dict()
    wrong = [name for name in targets if name not in generator or generator[name].shape != targets[name].shape] or [n for n in generator if n not in targets]
    if wrong:
        raise CheckpointError(f"{path} holds another model: {wrong[0]} differs; use another --logdir or --no-auto-resume")
    for name, target in targets.items():
        target.copy_(like(generator[name], target))
    set_optimizer(optimizer, module, numbered_state(optimizer, module, content["generator_optimizer"]))
    if ema.shadow:
        ema.load(_bare(content.get("generator_ema", generator)))
    if "random" in content:
        torch.set_rng_state(content["random"])
    return RunState(int(content["step"]), float(content.get("elapsed", 0.0)))


def _bare(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {strip_wrappers(name).removeprefix("model."): tensor for name, tensor in state.items()}
