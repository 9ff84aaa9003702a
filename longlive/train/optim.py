"""AdamW with warm-up and cosine, and an exponential moving average of the weights: small functions over a module."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from ..parallel.fsdp import like, local


def adamw(parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trainable ones; only matrices and kernels decay (norms, biases and modulation tables do not).

    Fused on every device: only torch's fused form leaves out a refused step (`guarded_step`).
    """
    parameters = [p for p in parameters if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2 and p.shape[0] > 1]
    kept = {id(p) for p in decayed}
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": [p for p in parameters if id(p) not in kept], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=1e-8, fused=True)


def guarded_step(parts: Iterable[torch.optim.Optimizer], refused: torch.Tensor) -> None:
    """One step of every optimizer, unless `refused`, a float32 scalar on the parameters' device, is 1: then weights and states stay as they are.

    By torch's own convention for overflows, the attribute `found_inf`, which fused AdamW and `muon.Muon` read on the device. Fused AdamW writes
    weights behind the back of their version counters; here they count, since what is made of weights (`cast.Stepper`, texts) is kept until they change.
    """
    for part in parts:
        part.found_inf = refused
        part.step()
        del part.found_inf
        torch.autograd.graph.increment_version([p for group in part.param_groups for p in group["params"]])


def learning_rate(step: int, progress: float, *, lr: float, warmup_steps: int, schedule: str) -> float:
    """Rate of step number `step` (from 0), at `progress` 0..1 through the run: linear warm-up, then constant, or a cosine to 0."""
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return lr * warm * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)) if schedule == "cosine" else 1.0)


class EMA:
    """A float32 copy of a module's parameters that follows them: shadow = d shadow + (1 - d) parameter.

    Before `start_step` it simply equals the parameters. `decay` 0 switches it off: `tensors` is then empty. Of sharded parameters each rank keeps and
    updates its own shard, on the device: nothing is gathered.
    """

    def __init__(self, module: nn.Module, decay: float, start_step: int = 0):
        self.decay, self.start_step = decay, start_step
        named = list(module.named_parameters()) if decay else []
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.shadow = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """After optimiser step number `step` (counted from 1)."""
        if not self.shadow:
            return
        current, shadow = [local(p.detach()).float() for p in self.parameters], self._local()
        if step <= self.start_step:
            torch._foreach_copy_(shadow, current)
        else:
            torch._foreach_lerp_(shadow, current, 1 - self.decay)

    def _local(self) -> list[torch.Tensor]:
        return [local(shadow) for shadow in self.shadow]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The shadow by name, laid out as the parameters are."""
        return dict(zip(self.names, self.shadow))

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """From whole tensors, equal on every rank."""
        for name, shadow in zip(self.names, self.shadow):
            shadow.copy_(like(tensors[name], shadow))
