"""The fixed order in which a loaded module is made ready to train: sequence -> recompute -> FSDP2 -> compile -> place.

Sequence parallelism comes first and needs nothing of the module: it is a decorator of attention (`ulysses`). Recomputation wraps a block's forward, so that
FSDP's gathering stays outside it and happens once per pass. Compilation is last and sees a block as it will run. `parallel` knows no model
and no trainer: blocks come as name patterns, recomputation and compilation as functions over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ..core.errors import LongLiveError
from .fsdp import LEAST_UNIT, matching, shard_mesh, shard_parameters, shards

OverBlocks = Callable[[Sequence[nn.Module]], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a module is to be trained.

    `blocks`, `entries`: fnmatch patterns of the transformer blocks and of the parts that are called outside the forward (`ModelSpec`).
    `strategy`: as `infra.sharding_strategy`. `wrap`: "transformer" makes every block a unit, "size" those of at least LEAST_UNIT parameters.
    `bf16`: sharded units compute in bfloat16. `recompute`, `compile`: applied to the blocks, None = not.
    """

    blocks: tuple[str, ...]
    entries: tuple[str, ...] = ()
    strategy: str = "no_shard"
    wrap: str = "transformer"
    bf16: bool = False
    recompute: OverBlocks | None = None
    compile: OverBlocks | None = None


def apply(module: nn.Module, device: torch.device, plan: Plan) -> nn.Module:
    """Makes `module` ready on `device`, in place. Every rank must call it.

    Raises LongLiveError where ranks start from different weights: each would train a model of its own.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    blocks = matching(module, plan.blocks)
    check_equal(module)
    if plan.recompute is not None:
        plan.recompute(blocks)
    if shards(plan.strategy, world):
        units = [b for b in blocks if plan.wrap == "transformer" or sum(p.numel() for p in b.parameters()) >= LEAST_UNIT]
        keep = plan.strategy == "hybrid_zero2"
        mesh = shard_mesh(plan.strategy, device.type)
        shard_parameters(module, mesh, units=units, entries=matching(module, plan.entries), bf16=plan.bf16, keep_gathered=keep)
    if plan.compile is not None:
        plan.compile(blocks)
    return module.to(device)


@torch.no_grad()
def check_equal(module: nn.Module) -> None:
    """Raises LongLiveError unless all ranks hold the same parameters, by a sum of each."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    named = list(module.named_parameters())
    sums = torch.stack([p.detach().sum(dtype=torch.float64).cpu() for _, p in named])
    least, most = sums.clone(), sums.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    different = [name for (name, _), a, b in zip(named, least.tolist(), most.tolist()) if a != b]
    if different:
        raise LongLiveError(f"ranks start from different weights ({different[0]} and {len(different) - 1} more); give all hosts the same files and code")
