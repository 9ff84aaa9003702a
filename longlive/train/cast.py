"""The three roles of distillation and the networks behind them: student, teacher, critic.

A role is a network, with at most one LoRA of its own on it, and the mask under which it sees a film. Roles that start from the same weights and keep them
frozen share one network in memory: then the student is that network with the LoRA `generator`, the critic with the LoRA `critic`, and the teacher is the
network itself. `Voice.speak` chooses whose LoRA takes part; it sets flags that forwards read, and writes nothing to the device. A block whose
activations are recomputed in the backward pass must find the flags of its forward: whoever computes a loss leaves its own role speaking.

Legend: I features in, O features out, R rank, M layers of one size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config.root import Config
from ..core.errors import ConfigError
from ..engine.parts import generator_path, model_config
from ..models import lora
from ..models.joint import join_projections
from ..models.lora import Adapter, Branch, branches
from ..models.lora_files import holds_lora, read_lora
from ..models.shipped import adapter_path
from ..models.sizes import dit_dims, shapes_of
from ..models.spec import ModelSpec
from ..models.wan_dit import WanDiT
from ..models.weights import build_on_meta, load_into, merge_record, native_state, read_state
from ..parallel.fsdp import whole
from ..parallel.mesh import Mesh
from ..precision.linear import QuantisedLinear
from .low_precision import CRITIC as CRITIC_QUANT
from .low_precision import GENERATOR, TEACHER, LowPrecision, low_precision, recipe_of, wants
from .scores import Mask

STUDENT, CRITIC = "generator", "critic"


@dataclass(eq=False)
class Voice:
    """One role: `dit` with the LoRA `adapter` on it (None: without any), seen under `mask`."""

    dit: WanDiT
    adapter: str | None
    mask: Mask
    all_branches: list[Branch] = field(default_factory=list)

    def speak(self) -> WanDiT:
        """The network, with this role's LoRA taking part and no other, until another role speaks."""
        for branch in self.all_branches:
            branch.silent = branch.adapter != self.adapter
        return self.dit


class AdapterView:
    """The parameters of one LoRA under their published names: what a player trains of its network. Satisfies `players.Trained`."""

    def __init__(self, dit: nn.Module, adapter: str):
        self.dit, self.adapter = dit, adapter

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from lora.adapter_state(self.dit, self.adapter).items()

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from lora.adapter_state(self.dit, self.adapter).values()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return lora.adapter_state(self.dit, self.adapter)


@dataclass(frozen=True)
class Cast:
    """`networks`: the distinct ones, once each. `low`: those of them that compute in low precision."""

    student: Voice
    teacher: Voice
    critic: Voice
    low: tuple[LowPrecision, ...] = ()

    @property
    def networks(self) -> list[WanDiT]:
        return list({id(v.dit): v.dit for v in (self.student, self.teacher, self.critic)}.values())


def places(config: Config, spec: ModelSpec) -> tuple[Path, Path, Path]:
    """Where student, teacher and critic start from: a checkpoint that is not named is the student's (spec training §6.1, D6)."""
    student, c = generator_path(config, spec), config.checkpoints
    return student, Path(c.real_score_ckpt or student), Path(c.fake_score_ckpt or student)


def masks(config: Config) -> tuple[Mask, Mask]:
    """Of teacher and critic: `algorithm.real_score_mask` and `fake_score_mask`, else what the documented switches say."""
    a = config.algorithm
    usual: Mask = "teacher_forced" if a.teacher_forcing else "causal" if a.all_causal else "bidirectional"
    return a.real_score_mask or usual, a.fake_score_mask or usual


def read_network(place: Path, config: Config, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> WanDiT:
    """The generator at `place`, in memory of its own. Raises CheckpointError that names the file that is missing or does not fit."""
    state = native_state(read_state(place, use_ema=config.inference.use_ema, kind="generator"), "generator")
    dims = dit_dims(shapes_of(state.tensors), spec.dit, model_config(place, spec))
    dit = build_on_meta(lambda: WanDiT(dims)).to(dtype).to_empty(device=device)
    load_into(dit, state, kind="generator")
    return dit


def make_cast(config: Config, spec: ModelSpec, device: torch.device, frozen_dtype: torch.dtype, source: Callable[..., WanDiT] = read_network) -> Cast:
    """Reads and adapts the networks of all roles. What trains is float32; what is frozen is in `frozen_dtype`, and shared where it can be.

    `source` is asked for a network as `read_network` is.
    """
    frozen: dict[tuple, WanDiT] = {}
    low: list[LowPrecision] = []

    def read(place: Path, dtype: torch.dtype, quant: str, still: bool) -> WanDiT:
        dit = source(place, config, spec, device, dtype)
        converted = low_precision(config, quant, dit, spec, Mesh(), frozen=still)
        low.extend([converted] if converted is not None else [])
        return dit

    def network(place: Path, trains: bool, quant: str) -> WanDiT:
        if trains:
            return read(place, torch.float32, quant, False)
        form = place, recipe_of(config, quant) if wants(config, quant) else None
        if form not in frozen:
            frozen[form] = read(place, frozen_dtype, quant, True).requires_grad_(False)
        return frozen[form]

    adapter, (at_student, at_teacher, at_critic) = config.adapter, places(config, spec)
    adapted = adapter is not None and adapter.apply_to_critic
    student, critic = network(at_student, adapter is None, GENERATOR), network(at_critic, not adapted, CRITIC_QUANT)
    teacher = network(at_teacher, False, TEACHER)
    for dit, name, wanted in ((student, STUDENT, adapter is not None), (critic, CRITIC, adapted)):
        if wanted:
            attach(dit, spec, config, name)
    names = (STUDENT if adapter else None, None, CRITIC if adapted else None)
    voices = [Voice(dit, name, mask) for dit, name, mask in zip((student, teacher, critic), names, ("causal", *masks(config)))]
    for voice in voices:
        voice.all_branches = [branch for _, branch in branches(voice.dit)]
        for branch in voice.all_branches:
            branch.requires_grad_(True)
    return Cast(*voices, tuple(low))


def attach(dit: WanDiT, spec: ModelSpec, config: Config, name: str) -> None:
    """Puts the LoRA of the `adapter` section on a network, equal on every rank (spec training §9.1, D7), and freezes everything else of it."""
    adapter, started = config.adapter, starting_adapter(config, name)
    rank, alpha = (adapter.fresh_rank, adapter.alpha) if started is None else (started.rank, started.alpha)
    lora.attach(dit, spec, rank, alpha, adapter.dropout, torch.Generator().manual_seed(config.logging.seed), name=name)
    if started is not None:
        lora.load_adapter_state(dit, published(started), name)


def origin(config: Config, spec: ModelSpec) -> dict[str, Any]:
    """What is merged into the weights that the student starts from (`weights.merge_record`).

    Raises ConfigError where it is to be a LoRA and one is merged already: nothing would apply it to that generator.
    """
    place = generator_path(config, spec)
    merged = merge_record(read_state(place, use_ema=config.inference.use_ema, kind="generator").metadata)
    if merged and config.adapter is not None:
        remedy = "train all weights (remove the adapter section), or start from the generator without it"
        raise ConfigError(f"{place} already has a LoRA merged into it, and a LoRA trained on it could not be applied to it; {remedy}")
    return merged


def starting_adapter(config: Config, name: str) -> Adapter | None:
    """What a LoRA starts from, weights only: the student from `checkpoints.lora_ckpt` in any layout, the critic from its entry there. None: from nothing.

    A file that states no alpha has scale 1 unless `adapter.alpha` says another one, as in generation. Raises ConfigError where `lora_ckpt` does not name one
    file, where layers differ in rank or scale (one number of each is trained), and where `adapter.rank` or `adapter.alpha` contradicts the file.
    """
    given, own = config.checkpoints.lora_ckpt, config.adapter
    paths = given if isinstance(given, tuple) else (given,)
    if len(paths) != 1:
        raise ConfigError(f"checkpoints.lora_ckpt names {len(paths)} files: training starts from one LoRA; give one, or set lora_ckpt: null")
    path = paths[0] and adapter_path(paths[0])
    if path is None or (name != STUDENT and not holds_lora(path, f"{name}_lora")):
        return None
    found = read_lora(path, name=name, entry=f"{name}_lora")
    ranks = sorted({layer.rank for layer in found.layers.values()})
    found = found.with_alpha(float(own.alpha or ranks[0]))
    scales = sorted({layer.scale for layer in found.layers.values()})
    if len(ranks) > 1 or len(scales) > 1:
        several = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"alpha / rank of {scales[0]:g} to {scales[-1]:g}"
        raise ConfigError(f"{path} has layers with {several}, and training has one for all; write one that has: longlive export {path} OUT --rank {ranks[0]}")
    if own.rank not in (None, ranks[0]):
        raise ConfigError(f"adapter.rank({own.rank}) but {path} has rank {ranks[0]}; remove adapter.rank")
    if own.alpha not in (None, found.alpha):
        raise ConfigError(f"adapter.alpha({own.alpha:g}) but {path} states {found.alpha:g}; set adapter.alpha: {found.alpha:g}, or remove it")
    return found


def published(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Its matrices under the published names."""
    sides = ((name, layer, side) for name, layer in adapter.layers.items() for side in "AB")
    return {f"{lora.PUBLISHED}{name}.lora_{side}.weight": layer.a_RI if side == "A" else layer.b_OR for name, layer, side in sides}


class Merged(Mapping):
    """The parameters of a network by name, those of layers with `adapter` with it merged in, computed when asked for. `tensors`: A and B, by published name.

    Sharded ones are gathered one by one: every rank must ask for the same.
    """

    def __init__(self, dit: WanDiT, adapter: str, tensors: Mapping[str, torch.Tensor]):
        self.plain = {name: p.detach() for name, p in dit.named_parameters() if f".{lora.BRANCHES}." not in name}
        self.plain |= {f"{name}.weight": layer for name, layer in dit.named_modules() if isinstance(layer, QuantisedLinear)}
        self.branches, self.tensors = dict(branches(dit, adapter)), tensors

    def __iter__(self):
        return iter(self.plain)

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, name: str) -> torch.Tensor:
        weight, layer = self.plain[name], name.removesuffix(".weight")
        weight = weight.dense(torch.float32) if isinstance(weight, QuantisedLinear) else whole(weight)
        if layer == name or layer not in self.branches:
            return weight
        a_RI, b_OR = (whole(self.tensors[f"{lora.PUBLISHED}{layer}.lora_{side}.weight"].detach()).float() for side in "AB")
        return weight.float() + self.branches[layer].alpha / len(a_RI) * (b_OR @ a_RI)


class Stepper:
    """A copy of the student for all that needs no gradients, in the compute precision and without LoRA branches: merged weights, brought up to date at use.

    A step of the solver is then a plain forward. It takes the memory of one more network.
    """

    def __init__(self, voice: Voice, dtype: torch.dtype):
        source = voice.dit
        self.dit = build_on_meta(lambda: WanDiT(source.dims)).to(dtype).to_empty(device=next(source.parameters()).device).eval().requires_grad_(False)
        join_projections(self.dit)
        own, mine = dict(source.named_parameters()), dict(self.dit.named_parameters())
        self.branches = dict(branches(source, voice.adapter)) if voice.adapter else {}
        self.sizes: dict[tuple, list[str]] = defaultdict(list)
        for layer in self.branches:
            self.sizes[tuple(own[f"{layer}.weight"].shape)].append(layer)
        self.own, self.mine, self.made = own, mine, None
        self.trained = [p for b in self.branches.values() for p in (b.a, b.b)] or list(own.values())
        with torch.no_grad():
            torch._foreach_copy_(list(mine.values()), [own[name].detach() for name in mine])

    @torch.no_grad()
    def current(self) -> WanDiT:
        """The copy with the student's weights of now."""
        version = sum(p._version for p in self.trained)
        if version != self.made:
            self.made = version
            if not self.branches:
                torch._foreach_copy_(list(self.mine.values()), [self.own[name].detach() for name in self.mine])
            for layers in self.sizes.values():
                self._merge(layers)
        return self.dit

    def _merge(self, layers: list[str]) -> None:
        found = [self.branches[layer] for layer in layers]
        scale = found[0].alpha / found[0].a.shape[0]
        weight_MOI = torch.stack([self.own[f"{layer}.weight"] for layer in layers]).float()
        merged = torch.baddbmm(weight_MOI, torch.stack([b.b for b in found]).float(), torch.stack([b.a for b in found]).float(), alpha=scale)
        torch._foreach_copy_([self.mine[f"{layer}.weight"] for layer in layers], list(merged.unbind()))
