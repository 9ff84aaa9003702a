"""What a run trains: one player, or several that take turns (distillation: the student and its critic).

A player is a network, or an adapter on one, with its own optimizer, rate, clip and average. Its name stands before its entries in checkpoints, as
published: `generator`, `critic`, `generator_lora`, `critic_lora`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from .muon import muon
from .optim import EMA, adamw
from .state import Optimizers


class Trained(Protocol):
    """The parameters of a player under the names of its checkpoint: a module, or a view of some of its parameters."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Role:
    """A player before it has an optimizer. `network` holds `trained` and is what is sharded; it learns at steps that `every` divides.

    Columns of the metrics are those of a run with one player, and begin with `prefix` for a further one.
    """

    name: str
    network: nn.Module
    trained: Trained
    lr: float
    betas: tuple[float, float]
    max_grad_norm: float
    ema_decay: float = 0.0
    every: int = 1
    prefix: str = ""


class Player:
    """A role with its optimizer and average."""

    def __init__(self, role: Role, *, optimizer: str = "adamw", weight_decay: float = 0.0, ema_start_step: int = 0):
        self.role, self.name, self.network, self.trained = role, role.name, role.network, role.trained
        self.parameters = [p for p in role.trained.parameters() if p.requires_grad]
        rates = {"lr": role.lr, "betas": role.betas, "weight_decay": weight_decay}
        self.optimizer: Optimizers = muon(role.network, **rates) if optimizer == "muon" else adamw(self.parameters, **rates)
        self.ema = EMA(role.trained, role.ema_decay, ema_start_step)

    def due(self, step: int) -> bool:
        """Whether it learns at step number `step`, from 0."""
        return step % self.role.every == 0
