"""LoRA: low-rank branches beside the Linear layers of a network. (`lora_files` reads and writes them, `lora_merge` puts them into the weights.)

The one idea: a layer with LoRA is the layer that it was, with branches that a forward hook adds to its output. Its class, its weight and their
names stay, so that it may be float or quantised and nothing else of the network changes. One `Branch` is one adapter on one layer; adapters
stack, and each has a live weight that may change between two forwards. Which layers may have one is a matter of `ModelSpec.linear_patterns`.

    y = W x + b + sum over adapters of weight * (alpha / rank) * B A x           (spec inference §10.2)

Legend: I features in, O features out, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import CheckpointError, InputError, nearest
from .keymaps import strip_wrappers
from .spec import ModelSpec
from .weights import StateFile, check_keys

BRANCHES = "lora"  # name of the branches inside a layer
PUBLISHED = "base_model.model."  # what published adapters put before the name of a layer


@dataclass(frozen=True, kw_only=True)
class LoraLayer:
    """One layer's matrices, `a_RI` and `b_OR`, in any float type. `alpha` None means the rank, which makes the scale 1."""

    a_RI: Tensor
    b_OR: Tensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def features(self) -> tuple[int, int]:
        """(out, in)"""
        return self.b_OR.shape[0], self.a_RI.shape[1]

    def truncated(self, rank: int) -> LoraLayer:
        """The nearest layer (in the sum of squares of its product) of no higher rank than `rank`, float32, with scale 1: the leading singular vectors."""
        left_OR, b_RR = torch.linalg.qr(self.b_OR.float() * self.scale)
        right_IR, a_RR = torch.linalg.qr(self.a_RI.float().T)
        u, s, v = torch.linalg.svd(b_RR @ a_RR.T)
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        return LoraLayer(a_RI=(v[:kept] * root[:, None]) @ right_IR.T, b_OR=left_OR @ (u[:, :kept] * root), alpha=float(kept))


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA in the canonical form: matrices by our name of the layer (`blocks.0.self_attn.q`), whatever file they came from."""

    name: str
    layers: dict[str, LoraLayer]
    path: Path | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int | None:
        """The rank of every layer; None where they differ."""
        return _only(layer.rank for layer in self.layers.values())

    @property
    def alpha(self) -> float | None:
        """The alpha that every layer states; None where they differ or state none."""
        return _only(layer.alpha for layer in self.layers.values())

    def with_alpha(self, alpha: float) -> Adapter:
        """The same matrices; `alpha` for the layers that state none."""
        layers = {name: layer if layer.alpha is not None else replace(layer, alpha=alpha) for name, layer in self.layers.items()}
        return replace(self, layers=layers)

    def truncated(self, rank: int) -> Adapter:
        """Its nearest approximation with ranks of at most `rank`. Raises InputError for a rank below 1."""
        if rank < 1:
            raise InputError(f"a LoRA of rank {rank} cannot be; the rank is at least 1")
        return replace(self, layers={name: layer.truncated(rank) for name, layer in self.layers.items()})


def _only(values: Iterable) -> Any:
    found = set(values)
    return found.pop() if len(found) == 1 else None


class Branch(nn.Module):
    """One adapter on one layer. `factor` = weight * alpha / rank is a float32 scalar on the layer's device: written, never rebuilt."""

    def __init__(self, adapter: str, a_RI: Tensor, b_OR: Tensor, alpha: float, weight: float = 1.0, dropout: float = 0.0):
        super().__init__()
        self.adapter, self.alpha, self.dropout = adapter, alpha, dropout
        self.a, self.b = nn.Parameter(a_RI), nn.Parameter(b_OR)
        self.weight, self.on, self.silent = weight, True, False
        self.register_buffer("factor", torch.zeros((), dtype=torch.float32, device=a_RI.device), persistent=False)
        self.write()

    @property
    def live(self) -> bool:
        """Whether the branch takes part. At weight 0 it is not computed, so that the output is the layer's own, bit for bit.

        `silent` leaves it out for some forwards, without a write to the device (`train.cast`); texts made meanwhile belong to those forwards.
        """
        return self.on and not self.silent and self.weight != 0

    def write(self) -> None:
        """Brings `factor` up to date, in place: what was made with the old one (`TextContext`) can tell."""
        if self.factor.dtype != torch.float32:  # the module was cast
            self.factor = self.factor.to(torch.float32)
        self.factor.fill_(self.weight * self.alpha / self.a.shape[0] if self.on else 0.0)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.write()
        return self

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y plus this branch, in y's precision; computed in the adapter's, or as autocast has it."""
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(self.a.dtype)
        x = F.dropout(x, self.dropout, self.training)
        return (y + F.linear(F.linear(x, self.a) * self.factor, self.b)).to(y.dtype)


def _add_branches(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """The forward hook of a layer with LoRA."""
    for branch in layer.lora:
        if branch.live:
            y = branch(args[0], y)
    return y


def lora_layers(module: nn.Module, spec: ModelSpec) -> dict[str, nn.Module]:
    """Name -> every layer of `module` that may have LoRA. Raises InputError when there is none."""
    found = {}
    for wrapped, child in module.named_modules():
        name = strip_wrappers(wrapped)
        if any(fnmatchcase(name, pattern) for pattern in spec.linear_patterns) and hasattr(child, "in_features") and hasattr(child, "out_features"):
            found[name] = child
    if not found:
        raise InputError(f"{type(module).__name__} has no Linear that matches {', '.join(spec.linear_patterns)}; give the spec of this model")
    return found


def branches(module: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, Branch]]:
    """(name of the layer, branch) of every branch, or of one adapter's, in the order of the network."""
    for name, child in module.named_modules():
        if isinstance(child, Branch) and adapter in (None, child.adapter):
            yield strip_wrappers(name).rpartition(f".{BRANCHES}.")[0], child


def _join(layer: nn.Module, branch: Branch) -> None:
    if not hasattr(layer, BRANCHES):
        layer.add_module(BRANCHES, nn.ModuleList())
        layer.register_forward_hook(_add_branches)
    layer.lora.append(branch.train(layer.training))


def attach(
    module: nn.Module,
    spec: ModelSpec,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    *,
    name: str = "default",
    dtype: torch.dtype = torch.float32,
) -> list[nn.Parameter]:
    """Puts a fresh adapter on every layer that may have one, freezes everything else of `module`, and returns the adapter's parameters.

    A is uniform within 1/sqrt(I), B zero: the output does not change yet. A is drawn on the CPU in float32, layer after layer, from `generator`: ranks with
    equal seeds start equal (spec training D7). `alpha` None: the rank. Raises InputError for a name that is taken and for numbers that cannot be.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise InputError(f"LoRA with rank {rank} and dropout {dropout}: the rank is at least 1, dropout in [0, 1)")
    _free(module, name)
    alpha = float(rank) if alpha is None else alpha
    for layer in lora_layers(module, spec).values():
        device = next(layer.parameters()).device
        a_RI = torch.empty(rank, layer.in_features).uniform_(-1, 1, generator=generator) / math.sqrt(layer.in_features)
        b_OR = torch.zeros(layer.out_features, rank, dtype=dtype, device=device)
        _join(layer, Branch(name, a_RI.to(device=device, dtype=dtype), b_OR, alpha, dropout=dropout))
    return train_only(module, name)


def add(module: nn.Module, spec: ModelSpec, adapter: Adapter, *, weight: float = 1.0, dtype: torch.dtype | None = None) -> None:
    """Puts a finished adapter on the layers that it has, frozen, in `dtype` (default: its own), with a live weight.

    Raises CheckpointError when it was made for another model, InputError for a name that is taken.
    """
    layers = lora_layers(module, spec)
    check_fit(adapter, {name: (layer.out_features, layer.in_features) for name, layer in layers.items()})
    _free(module, adapter.name)
    for name, part in adapter.layers.items():
        layer = layers[name]
        device = next((t.device for t in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
        a_RI, b_OR = (t.detach().to(device=device, dtype=dtype, copy=True) for t in (part.a_RI, part.b_OR))
        _join(layer, Branch(adapter.name, a_RI, b_OR, part.scale * part.rank, finite_weight(weight, adapter.name)).eval().requires_grad_(False))


def check_fit(adapter: Adapter, features: Mapping[str, tuple[int, int]]) -> None:
    """Raises CheckpointError, in one line, unless every layer of `adapter` is one of `features` (name -> (out, in)) and has its size."""
    wrong = [f"{name} is not in it" for name in adapter.layers if name not in features]
    wrong += [
        f"{name} is {layer.features[1]} -> {layer.features[0]} in the LoRA and {features[name][1]} -> {features[name][0]} in the model"
        for name, layer in adapter.layers.items()
        if name in features and layer.features != tuple(features[name])
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(f"{adapter.path or adapter.name} was made for another model: {wrong[0]}{more}; use it with the model it belongs to")


def _free(module: nn.Module, name: str) -> None:
    if any(True for _ in branches(module, name)):
        raise InputError(f"there is already a LoRA called {name!r} on this network; give the other one another name")


def finite_weight(weight: float, name: str) -> float:
    if not math.isfinite(weight):
        raise InputError(f"LoRA {name!r} with weight {weight}: a weight is a finite number (0 turns it off)")
    return float(weight)


class LoraStack:
    """The adapters on a network, as one handle: names, live weights, parameters. It holds nothing of its own."""

    def __init__(self, module: nn.Module):
        self.module = module

    @property
    def weights(self) -> dict[str, float]:
        """Adapter -> live weight, in the order of the stack."""
        return {branch.adapter: branch.weight for _, branch in branches(self.module)}

    def set_weight(self, name: str, weight: float) -> None:
        """Changes a live weight, from the next forward on; keys and values that are already cached stay. Raises InputError for an unknown name."""
        for branch in self._of(name):
            branch.weight = finite_weight(weight, name)
            branch.write()

    def enable(self, name: str | None = None, on: bool = True) -> None:
        """Switches one adapter, or all of them, on or off; weights are kept."""
        for branch in self._of(name):
            branch.on = on
            branch.write()

    @contextmanager
    def off(self) -> Iterator[None]:
        """The plain network inside a `with`. For passes without gradients: a checkpointed block is recomputed after the `with` has ended."""
        was = {id(branch): branch.on for branch in self._of(None)}
        self.enable(on=False)
        try:
            yield
        finally:
            for branch in self._of(None):
                branch.on = was[id(branch)]
                branch.write()

    def _of(self, name: str | None) -> list[Branch]:
        found = [branch for _, branch in branches(self.module, name)]
        if not found and name is not None:
            close = nearest(name, self.weights)
            meant, there = f"; did you mean {close!r}?" if close else "", ", ".join(self.weights) or "none"
            raise InputError(f"there is no LoRA called {name!r}{meant} (there are: {there})")
        return found


def train_only(module: nn.Module, name: str) -> list[nn.Parameter]:
    """Makes the parameters of one adapter the only ones of `module` that want gradients, and returns them (A, B of each layer in turn)."""
    module.requires_grad_(False)
    chosen = [p for _, branch in branches(module, name) for p in (branch.a, branch.b)]
    if not chosen:
        raise InputError(f"there is no LoRA called {name!r} to train; attach it first")
    for p in chosen:
        p.requires_grad_(True)
    return chosen


def adapter_state(module: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The parameters of one adapter under their published names: `base_model.model.<layer>.lora_A.weight` [R, I], `.lora_B.weight` [O, R].

    They are the parameters themselves; sharded ones are gathered by who writes them.
    """
    state = {}
    for layer, branch in branches(module, name):
        state |= {f"{PUBLISHED}{layer}.lora_A.weight": branch.a, f"{PUBLISHED}{layer}.lora_B.weight": branch.b}
    return state


@torch.no_grad()
def load_adapter_state(module: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Fills an attached adapter in place from what `adapter_state` gave. Raises CheckpointError unless keys and shapes are exactly its own."""
    own = adapter_state(module, name)
    check_keys({key: tuple(p.shape) for key, p in own.items()}, StateFile(tensors=dict(state), path=Path(f"the state of LoRA {name}")))
    for key, parameter in own.items():
        parameter.copy_(state[key])


def adapter_of(module: nn.Module, name: str = "default") -> Adapter:
    """The adapter called `name` on a network, as it would be read from a file; its tensors are the network's own. Raises InputError for an unknown name."""
    layers = {layer: LoraLayer(a_RI=b.a, b_OR=b.b, alpha=b.alpha) for layer, b in branches(module, name)}
    if not layers:
        raise InputError(f"there is no LoRA called {name!r} on this network; attach it first")
    return Adapter(name=name, layers=layers)
