"""Muon: momentum whose update is made orthogonal, for the weight matrices of transformer blocks; AdamW for everything else.

The update of a matrix is its momentum with all singular values brought near 1 by five Newton-Schulz steps (Jordan et al., 2024), scaled by
0.2 sqrt(max(rows, columns)) so that its size is that of an AdamW update (Liu et al., 2025): one learning rate and one decay serve both.
The same numbers as `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` (on a CPU to its rounding to bfloat16), with matrices of one shape stacked
into one batched product: a small model has many small matrices, and their launches would cost more than their arithmetic.

Legend: M matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from ..core.errors import ConfigError
from ..parallel.fsdp import is_sharded
from .optim import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7
SMALLEST = 16  # rows or columns below which a matrix is left to AdamW


def orthogonalised(update_MRC: torch.Tensor) -> torch.Tensor:
    """[M, R, C]: each matrix with its singular values brought near 1. bfloat16 on a GPU; float32 on a CPU, whose bfloat16 products are far slower."""
    a, b, c = COEFFICIENTS
    x = update_MRC.bfloat16() if update_MRC.is_cuda else update_MRC.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum over matrices (parameters of two dimensions). State: `momentum_buffer`, float32, one per matrix.

    `found_inf`: 1 on the device leaves weights and state as they are, whatever the gradients (`optim.guarded_step`).
    """

    found_inf: torch.Tensor | None = None

    def __init__(self, params, *, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            stacks = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    stacks[parameter.shape].append(parameter)
            for parameters in stacks.values():
                self._update(parameters, group)

    def _update(self, parameters: list[nn.Parameter], group: dict) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        gradient_MRC, buffer_MRC = torch.stack([p.grad for p in parameters]), torch.stack(buffers)
        refused = (torch.zeros_like(buffer_MRC[0, 0, 0]) if self.found_inf is None else self.found_inf).bool()
        gradient_MRC = torch.where(refused, buffer_MRC, gradient_MRC)  # towards itself a buffer does not move
        buffer_MRC.lerp_(gradient_MRC, 1 - group["momentum"])
        torch._foreach_copy_(buffers, list(buffer_MRC.unbind()))
        update_MRC = orthogonalised(gradient_MRC.lerp(buffer_MRC, group["momentum"])).to(parameters[0].dtype).masked_fill(refused, 0)
        decay = torch.full_like(update_MRC[0, 0, 0], 1 - group["lr"] * group["weight_decay"]).masked_fill(refused, 1)
        torch._foreach_mul_(parameters, decay)
        scale = 0.2 * max(update_MRC.shape[1:]) ** 0.5
        torch._foreach_add_(parameters, list(update_MRC.unbind()), alpha=-group["lr"] * scale)


class Both:
    """Two optimisers that act as one: shared `param_groups`, one `step`, one state."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict:
        return {str(number): optimizer.state_dict() for number, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict) -> None:
        for number, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(number)])


def muon(module: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer | Both:
    """Muon for the matrices inside the transformer blocks, AdamW for the rest; plain AdamW for a module without blocks.

    Raises ConfigError for sharded parameters: an orthogonal update needs the whole matrix.
    """
    if is_sharded(module):
        whole = "training.optimizer(muon) updates whole matrices, and infra.sharding_strategy has split them between processes"
        raise ConfigError(f"{whole}; set infra.sharding_strategy: no_shard, or training.optimizer: adamw")
    inside = [p for name, p in module.named_parameters() if name.startswith("blocks.")]
    matrices = [p for p in inside if p.requires_grad and p.ndim == 2 and min(p.shape) >= SMALLEST]
    if not matrices:
        return adamw(module.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
    taken = {id(p) for p in matrices}
    rest = (p for p in module.parameters() if id(p) not in taken)
    return Both(Muon(matrices, lr=lr, weight_decay=weight_decay), adamw(rest, lr=lr, betas=betas, weight_decay=weight_decay))
