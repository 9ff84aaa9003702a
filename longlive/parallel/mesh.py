"""The grid of processes: `dp` groups that take different samples, of `sp` neighbouring ranks that share one sample.

World size = dp x sp, and the ranks of one sample are consecutive, so that their exchanges stay inside a host (spec training §0). A plain process is a grid
of one, on which every method is free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..core.errors import ConfigError
from .data_parallel import Replicas


@dataclass(frozen=True)
class Mesh:
    """This process on the grid. `grid` is the DeviceMesh with axes "dp" and "sp"; None for a single process, and where `group` is given instead.

    `group`: the ranks that share this rank's sample, of groups that may differ in size (`film_groups`); `sp_size` is that of its own.
    """

    dp_rank: int = 0
    dp_size: int = 1
    sp_rank: int = 0
    sp_size: int = 1
    grid: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None

    @classmethod
    def launch(cls, sp_size: int, device_type: str, *, key: str = "infra.sequence_parallel_size") -> "Mesh":
        """Joins the processes that torchrun started (gloo on a CPU, NCCL on GPUs) and lays them out in groups of `sp_size`.

        Every rank must call it. Raises ConfigError, naming the configuration `key`, where `sp_size` does not divide the world size.
        """
        replicas = Replicas.launch(device_type)
        check_grid(replicas.size, sp_size, key)
        if replicas.size == 1:
            return cls()
        dp_size = replicas.size // sp_size
        grid = init_device_mesh(device_type, (dp_size, sp_size), mesh_dim_names=("dp", "sp"))
        return cls(replicas.rank // sp_size, dp_size, replicas.rank % sp_size, sp_size, grid)

    @property
    def size(self) -> int:
        """World size."""
        return self.dp_size * self.sp_size

    @property
    def sp_group(self) -> dist.ProcessGroup | None:
        """The ranks that share this rank's sample; None where it is alone."""
        if self.sp_size == 1 or self.group is not None:
            return self.group
        return self.grid.get_group("sp")

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks of the world, a constant."""
        total = tensor.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[sp, ...]: the tensors of the ranks that share a sample, all of one shape, in rank order, constants."""
        if self.sp_size == 1:
            return tensor.detach()[None]
        gathered = tensor.new_empty(self.sp_size, *tensor.shape)
        dist.all_gather(list(gathered.unbind()), tensor.detach().contiguous(), group=self.sp_group)
        return gathered

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any of the ranks that share this rank's sample; all of them must ask."""
        if self.sp_size == 1:
            return flag
        raised = torch.tensor([int(flag)])
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self.sp_group)
        return bool(raised.item())

    def largest(self, value: torch.Tensor) -> torch.Tensor:
        """The largest of the values of the ranks that share a sample, element by element, a constant."""
        if self.sp_size == 1:
            return value.detach()
        largest = value.detach().contiguous().clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.sp_group)
        return largest


def check_grid(world_size: int, sp_size: int, key: str = "infra.sequence_parallel_size") -> None:
    """Raises ConfigError, with the equation, unless `world_size` processes form groups of `sp_size`."""
    if sp_size < 1 or world_size % sp_size:
        rest = f" = {world_size % sp_size}, not 0" if sp_size > 0 else ": at least 1"
        wanted = f"launch a multiple of {sp_size} processes or change {key}" if sp_size > 0 else f"set {key} to 1 or more"
        raise ConfigError(f"WORLD_SIZE({world_size}) % {key}({sp_size}){rest}; {wanted}")


def check_heads(heads: int, sp_size: int) -> None:
    """Raises ConfigError, with the equation, unless every rank gets equally many attention heads."""
    if heads % sp_size:
        whole = [n for n in range(1, heads + 1) if heads % n == 0]
        equation = f"attention heads({heads}) % sequence parallel size({sp_size}) = {heads % sp_size}, not 0"
        raise ConfigError(f"{equation}: every rank attends with equally many heads; use one of {', '.join(map(str, whole))}")
