"""What a chunk sees in training and at which distance, in the terms of generation.

Legend: B batch, c chunks, P visible chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..cache.attend import visible_tensor
from ..engine.pipeline import rollout_settings
from ..engine.rollout import RolloutSettings

if TYPE_CHECKING:
    from ..config.root import Config


def training_view(config: "Config") -> RolloutSettings:
    """Window and positions of training: with `training.visibility: window` those that generation will use.

    Else the published ones, whatever the films of an evaluation are made with: absolute positions, scaled by `model_kwargs.t_scale`.
    """
    served = rollout_settings(config)
    return served if config.training.visibility == "window" else replace(served, relative=False, t_scale=config.model_kwargs.t_scale)


def visible_chunks(
    config: "Config", view: RolloutSettings, cuts_Bc: Sequence[Sequence[bool]]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(visible_BcP, committed_BcP) of `teacher_forcing.Film`; (None, None) where every chunk sees all earlier ones."""
    if config.training.visibility == "all":
        return None, None
    return visible_tensor(cuts_Bc, view.policy), visible_tensor(cuts_Bc, view.policy, commit=True) if view.recache else None
