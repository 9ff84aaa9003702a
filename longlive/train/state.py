"""What a run carries from step to step beside its weights: optimizer state by parameter name, random states, and modes that must not leak.

Optimizer state is kept by the parameters' names, never by their order, so that any optimizer layout and any sharding can read it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..core.log import logger
from ..data.sources import few
from ..parallel.fsdp import like, reshard
from .muon import Both, Muon

Optimizers = torch.optim.Optimizer | Both
ADAMW_STATE, MUON_STATE = frozenset({"step", "exp_avg", "exp_avg_sq"}), frozenset({"momentum_buffer"})


def entry(player: str) -> str:
    """What stands before the names of a player's optimizer state."""
    return f"{player}_optimizer."


def parts(optimizer: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    return optimizer.optimizers if isinstance(optimizer, Both) else (optimizer,)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """In the order in which torch numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _names(module: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in module.named_parameters()}


def optimizer_tensors(optimizer: Optimizers, module: nn.Module, player: str = "generator") -> dict[str, torch.Tensor]:
    """`{player}_optimizer.{exp_avg, step, ...}.{parameter}`; empty before the first step."""
    names, found = _names(module), {}
    for part in parts(optimizer):
        for parameter, state in part.state.items():
            found |= {f"{entry(player)}{key}.{names[id(parameter)]}": value for key, value in state.items()}
    return found


def optimizer_targets(module: nn.Module, sizes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], player: str = "generator") -> dict[str, torch.Tensor]:
    """Empty tensors for what a checkpoint holds of the optimizer of `module`, laid out as its parameters are."""
    parameters, found = dict(module.named_parameters()), {}
    for name, (shape, dtype) in sizes.items():
        parameter = parameters.get(name.removeprefix(entry(player)).split(".", 1)[1])
        if parameter is not None:
            found[name] = torch.empty_like(parameter.detach(), dtype=dtype) if shape == tuple(parameter.shape) else torch.empty(shape, dtype=dtype)
    return found


def set_optimizer(optimizer: Optimizers, module: nn.Module, tensors: Mapping[str, torch.Tensor], player: str = "generator") -> None:
    """Gives the optimizer the state `tensors`, named as in `optimizer_tensors`. Rates and decays stay those of the configuration.

    State of another optimizer is left out, and one line says of which parameters: theirs starts anew.
    """
    names, by_parameter, anew = _names(module), {}, []
    for name, tensor in tensors.items():
        key, parameter = name.removeprefix(entry(player)).split(".", 1)
        by_parameter.setdefault(parameter, {})[key] = tensor
    for part in parts(optimizer):
        keys, numbered = MUON_STATE if isinstance(part, Muon) else ADAMW_STATE, {}
        for number, parameter in enumerate(_parameters(part)):
            state = by_parameter.get(names[id(parameter)], {})
            if state.keys() >= keys:
                numbered[number] = {key: state[key] for key in keys}
            elif state:
                anew.append(names[id(parameter)])
        part.load_state_dict({"state": numbered, "param_groups": part.state_dict()["param_groups"]})
    if anew:
        logger.warning("the checkpoint is of another training.optimizer; the %s's optimizer starts anew for %d parameters: %s", player, len(anew), few(anew))


def numbered_state(optimizer: Optimizers, module: nn.Module, state: Mapping) -> dict[str, torch.Tensor]:
    """State as torch's `state_dict` holds it (by number, or by name as FSDP writes it), under the names of `optimizer_tensors`, laid out as here.

    Empty, with a warning, where another optimizer wrote it: its numbers are of other parameters.
    """
    names, parameters, found = _names(module), dict(module.named_parameters()), {}
    if isinstance(optimizer, Both) == ("state" in state):
        logger.warning("the checkpoint is of another training.optimizer; the optimizer starts anew for all parameters")
        return {}
    for number, part in enumerate(parts(optimizer)):
        entries = state[str(number)]["state"] if isinstance(optimizer, Both) else state["state"]
        for place, parameter in enumerate(_parameters(part)):
            name = names[id(parameter)]
            for key, value in entries.get(place, entries.get(name, entries.get(f"model.{name}", {}))).items():
                value = torch.as_tensor(value)
                found[f"{entry('generator')}{key}.{name}"] = (like(value, parameters[name]) if value.shape == parameter.shape else value).clone()
    return found


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The process-wide generators of torch. Steps draw from generators of their own (`trainer.Draw`); these are kept for whatever does not."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def untouched(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Whatever runs inside without gradients, the next training step is the one that it would have been."""
    states, python = random_state(device), random.getstate()
    modes = [(part, part.training) for part in module.modules()]
    benchmark = torch.backends.cudnn.benchmark
    try:
        with torch.no_grad():
            yield
    finally:
        set_random_state(states, device)
        random.setstate(python)
        torch.backends.cudnn.benchmark = benchmark
        for part, training in modes:
            part.training = training
        reshard(module)
