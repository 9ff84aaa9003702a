"""Parameters, gradients and optimizer state shared between ranks (FSDP2), by the documented strategies.

    full           over all ranks of the world; gathered for a unit's forward and again for its backward
    hybrid_full    over the ranks of a host, replicated between hosts; gathered as in `full`
    hybrid_zero2   as hybrid_full, but a unit stays gathered from its forward to its backward: less exchange, more memory
    no_shard       every rank holds everything (`data_parallel.Replicas` averages the gradients)

Masters, gradients and optimizer state are float32 shards; a unit computes in bfloat16 where asked, and gradients are reduced in float32. Gradients are
averaged over the *world* in every strategy, which is what `loss.global_mean` expects of any mix of dp and sp: ranks that share a sample hold
different gradients of the same weights, so parameters are sharded over them too. One process shards nothing.

Units are given by name patterns (`models.spec.ModelSpec`): this package imports no model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ..core.errors import ConfigError
from ..core.log import environment

NO_SHARD = "no_shard"
LEAST_UNIT = 50_000_000  # parameters of a unit under the wrap strategy "size"


def shards(strategy: str, world: int) -> bool:
    """Whether `strategy` shards anything over `world` processes."""
    return world > 1 and strategy != NO_SHARD


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def matching(module: nn.Module, patterns: Iterable[str]) -> list[nn.Module]:
    """The parts of `module` whose names match one of the fnmatch patterns at the pattern's own depth, in the module's order."""
    patterns = list(patterns)
    return [part for name, part in module.named_modules() if any(fnmatchcase(name, p) and name.count(".") == p.count(".") for p in patterns)]


def shard_mesh(strategy: str, device_type: str) -> DeviceMesh:
    """The grid of all processes that `strategy` shards over: one axis, or (replicate, shard) with the processes of a host on the second.

    Every rank must call it. Raises ConfigError where hosts run different numbers of processes.
    """
    world = dist.get_world_size()
    if strategy == "full":
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    local = int(environment("LOCAL_WORLD_SIZE", str(world)))
    if world % local:
        equation = f"WORLD_SIZE({world}) % LOCAL_WORLD_SIZE({local}) = {world % local}, not 0"
        raise ConfigError(f"{equation}: infra.sharding_strategy({strategy}) needs equally many processes on every host; use full")
    if local == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (world // local, local), mesh_dim_names=("replicate", "shard"))


def shard_parameters(
    module: nn.Module, mesh: DeviceMesh, *, units: Iterable[nn.Module], entries: Iterable[nn.Module] = (), bf16: bool = False, keep_gathered: bool = False
) -> None:
    """Shards `module` over `mesh` in place: each unit, each entry, and the rest as one unit. Parameters become DTensors; their names stay.

    `entries` are parts that are called on their own, outside the module's forward; their floating inputs are cast to the compute type. `bf16`: compute
    in bfloat16. `keep_gathered`: units stay gathered between forward and backward. Parameters must be equal on all ranks; they may still
    be on the CPU, and are moved unit by unit.
    """
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # nothing in a forward writes in place
    compute = torch.bfloat16 if bf16 else None
    reduce = torch.float32 if bf16 else None
    # inputs are not cast: positions and noise levels are wider than the weights on purpose (spec training §9.1, D10)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    casting = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=True)
    for part in entries:
        fully_shard(part, mesh=mesh, mp_policy=casting)
    for part in units:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_gathered)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    _make_root(module)


def _make_root(module: nn.Module) -> None:
    """FSDP takes the part that runs first for the root; an entry may run before the module itself does."""
    module.fsdp_start = _nothing
    register_fsdp_forward_method(module, "fsdp_start")
    module.fsdp_start(None)  # torch 2.11 fails on a CUDA device where there is no argument
    del module.fsdp_start
    module.reshard()


def _nothing(_: None) -> None:
    return None


def reshard(module: nn.Module) -> None:
    """Back to shards after a forward without a backward (evaluation). Does nothing to a module that is whole."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def reduce_gradients(module: nn.Module, on: bool) -> None:
    """Whether the next backward ends with a reduction. Off for all but the last micro-step: gradients add up unreduced on every rank."""
    if is_sharded(module):
        module.set_requires_gradient_sync(on)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, sharing memory with `tensor`; a whole tensor is its own shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on every rank. Every rank must call it for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`tensor`, whole and equal on every rank, laid out as `target` is; nothing is exchanged."""
    if not isinstance(target, DTensor):
        return tensor
    return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The norm of all gradients together over all ranks, a scalar that is equal on every rank."""
    return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
