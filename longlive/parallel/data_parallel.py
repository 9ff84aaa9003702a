"""Data parallelism in its simplest form: every rank has all weights and its own data; gradients are averaged by one flat all-reduce."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ..core.log import launch_rank


@dataclass(frozen=True)
class Replicas:
    """This process among its copies. rank 0 writes files; size 1 makes every method free. `started`: it joined the group, and so it leaves it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    started: bool = False

    @classmethod
    def launch(cls, device_type: str) -> "Replicas":
        """Joins the group that torchrun describes; a plain process is a group of one."""
        rank, size, local_rank = launch_rank()
        started = size > 1 and not dist.is_initialized()
        if started:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
        return cls(rank, size, local_rank, started)

    def average_gradients(self, module: nn.Module) -> None:
        if self.size == 1:
            return
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat.div_(self.size)
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gradients]), gradients)])

    def maximum(self, *values: float) -> list[float]:
        """The largest of each number over all ranks (clock readings, stop requests), so that every rank takes the same decision."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return shared.tolist()

    def leave(self) -> None:
        if self.started and dist.is_initialized():
            dist.destroy_process_group()
