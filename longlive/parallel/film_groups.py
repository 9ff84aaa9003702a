"""Processes that make films: groups of neighbouring ranks, each of which makes one film after another together, different groups different films.

The groups may differ in size (`auto_sp_remainder`), which a grid cannot say: every rank's `Mesh` describes its own group. (Spec inference §7.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from ..core.errors import ConfigError
from .data_parallel import Replicas
from .failure import together
from .mesh import Mesh

LONGEST = timedelta(days=30)  # that groups without films wait for the last one


def group_sizes(world_size: int, sp_size: int, dp_size: int, *, remainder: bool = False, shares: int = 1) -> list[int]:
    """Ranks of each group, in rank order. `shares`: what a group's size must divide (heads and frames alike).

    Without `remainder` dp_size groups of sp_size. With it as many of them as there are ranks for, and from the ranks that are left groups of the largest
    size that works, up to dp_size in all. Raises ConfigError, with the equation, unless every rank has a group.
    """
    if not remainder:
        if (asked := sp_size * dp_size) != world_size:
            launch = f"launch {asked} processes (torchrun --nproc_per_node={asked}) or change the sizes"
            raise ConfigError(f"sp_size({sp_size}) x dp_size({dp_size}) = {asked} != WORLD_SIZE({world_size}); {launch}")
        return [sp_size] * dp_size
    sizes = [sp_size] * min(world_size // sp_size, dp_size)
    while (rest := world_size - sum(sizes)) and len(sizes) < dp_size:
        sizes.append(max(n for n in range(1, min(sp_size, rest) + 1) if shares % n == 0))
    if rest:
        equation = f"WORLD_SIZE({world_size}) - {' - '.join(map(str, sizes))} = {rest}, not 0"
        raise ConfigError(f"{equation}: {rest} processes would have no group (sp_size {sp_size}, dp_size {dp_size}); raise dp_size or launch fewer")
    return sizes


def group_of(rank: int, sizes: list[int]) -> tuple[int, int]:
    """(number of the rank's group, its place in it)."""
    number = next(i for i in range(len(sizes)) if rank < sum(sizes[: i + 1]))
    return number, rank - sum(sizes[:number])


@contextmanager
def film_mesh(sizes: list[int], device_type: str) -> Iterator[Mesh]:
    """Joins the processes that torchrun started, as groups of `sizes`; inside, a rank that fails ends all. At its end all ranks have come so far.

    Every rank must enter it, with one process for each rank of `sizes`. dp_size of the mesh is the number of groups.
    """
    replicas = Replicas.launch(device_type)
    try:
        with together(replicas):
            last = dist.new_group(backend="gloo", timeout=LONGEST) if replicas.size > 1 else None
            number, place = group_of(replicas.rank, sizes)
            group = None
            for i, size in enumerate(sizes):
                if size > 1:
                    made = dist.new_group(list(range(sum(sizes[:i]), sum(sizes[: i + 1]))))
                    group = made if i == number else group
            yield Mesh(number, len(sizes), place, sizes[number], group=group)
            if last is not None:
                dist.barrier(group=last)
    finally:
        replicas.leave()
