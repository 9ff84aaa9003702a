"""A model's linear layers made into quantised ones, in place, layer by layer, with a report of what was done and what was left.

`Converter.convert(model, spec) -> ConversionReport` is the protocol; `LinearConverter` is the one for number formats. It meets the model through its
`ModelSpec` name patterns and the configuration's list of filtered modules, and it finds plain `nn.Linear` leaves only: LoRA branches are attached afterwards.
Weights that a file holds quantised already (`given`) are taken as they are; all others are quantised from the layer's own weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import nn

from ..core.errors import CheckpointError, ConfigError
from ..ops import nvfp4
from ..ops.fp8 import RowFP8
from ..ops.fp8_matmul import MULTIPLE
from ..ops.nvfp4 import NVFP4
from ..ops.packed import PackedTensor
from .backends import FP8, NATIVE, TE, TORCHAO, W4A8, W4A16, Backend
from .linear import EmulatedLinear, Fp8Linear, NativeLinear, QuantisedLinear, W4A8Linear, W4A16Linear
from .selection import filtered, quantised_linears

MULTIPLES = {FP8: MULTIPLE, TORCHAO: MULTIPLE, W4A8: MULTIPLE, NATIVE: 32, TE: 32}


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion did. `converted`: layer -> how it is computed; `kept`: layer -> why it stays. Bytes are those of the converted layers' weights."""

    backend: str
    converted: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def line(self) -> str:
        """One line for people."""
        sizes = f"{self.bytes_before / 2**20:.0f} -> {self.bytes_after / 2**20:.0f} MiB"
        return f"{len(self.converted)} linear layers computed as {self.backend} ({sizes}), {len(self.kept)} kept"


class Converter(Protocol):
    """Changes a model in place before live LoRA, sharding and compilation."""

    def convert(self, model: nn.Module, spec: Any) -> ConversionReport: ...


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which layers: `filtered` names and regular expressions stay, and with `default` the documented list; whole blocks at both ends too."""

    filtered: tuple[str, ...] = ()
    default: bool = True
    skip_first: int = 0
    skip_last: int = 0

    def names(self, model: nn.Module, spec: Any) -> list[str]:
        """Layers to quantise. Raises ConfigError when none is left, or a filter names nothing."""
        found = quantised_linears(model, self.filtered, default=self.default)
        if self.default:
            found = [name for name in found if any(fnmatchcase(name, pattern) for pattern in spec.linear_patterns)]
        ends = self._ends(model, spec)
        found = [name for name in found if not any(name.startswith(block + ".") for block in ends)]
        if not found:
            skipped = f"filtered modules and {self.skip_first} + {self.skip_last} skipped blocks"
            raise ConfigError(f"no linear layer is left to quantise after {skipped}; shorten the list or skip fewer blocks")
        return found

    def _ends(self, model: nn.Module, spec: Any) -> list[str]:
        depths = {pattern.count(".") for pattern in spec.block_patterns}
        blocks = [n for n, _ in model.named_modules() if n.count(".") in depths and any(fnmatchcase(n, p) for p in spec.block_patterns)]
        return blocks[: self.skip_first] + (blocks[-self.skip_last :] if self.skip_last else [])


def unfit(backend: Backend, selection: Selection, name: str, layer: nn.Linear) -> str | None:
    """Why `backend` leaves a selected layer as it is, in training as in generation; None: it takes it."""
    if selection.default and filtered([name], backend.spares):
        return f"{backend.name} spares it"
    step = MULTIPLES.get(backend.name, 1)
    if layer.in_features % step or layer.out_features % step:
        return f"{layer.in_features} -> {layer.out_features} are not both multiples of {step}"
    return None


@dataclass(frozen=True, kw_only=True)
class LinearConverter:
    """Quantises the selected layers for `backend`, less those that it spares; what is `given` is never spared.

    weight_rule, tile, activation_rule   NVFP4 scale rules and the tile of the weights' scales
    given        quantised weights by parameter name (`blocks.0.ffn.0.weight`)
    device       where the weights are quantised and the new layers live; None: where they are
    prepare      replaces the construction for packages (`te`, `torchao`): (name, layer) -> layer
    """

    backend: Backend
    selection: Selection = Selection()
    weight_rule: str = "mse"
    tile: int = 1
    activation_rule: str = "mse"
    given: Mapping[str, PackedTensor] = field(default_factory=dict)
    device: torch.device | str | None = None
    prepare: Callable[[str, nn.Linear], nn.Module] | None = None

    @torch.no_grad()
    def convert(self, model: nn.Module, spec: Any) -> ConversionReport:
        """Replaces layers in place. Raises ConfigError for an empty selection, CheckpointError for given weights that the selection does not cover."""
        chosen = self.selection.names(model, spec)
        given = {name.removesuffix(".weight"): weight for name, weight in self.given.items()}
        stray = [name for name in given if name not in chosen]
        if stray:
            remedy = "take it off the filtered modules, or skip no block"
            raise CheckpointError(f"{stray[0]} is quantised in the checkpoint and filtered out in the configuration; {remedy}")
        converted, kept, before, after = {}, {}, 0, 0
        for name in [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
            layer = model.get_submodule(name)
            reason = "not selected" if name not in chosen else None if name in given else unfit(self.backend, self.selection, name, layer)
            if reason is not None:
                kept[name] = reason
                continue
            new = self._layer(name, layer, given.get(name))
            before += 2 * layer.in_features * layer.out_features
            after += new.stored.bytes if isinstance(new, QuantisedLinear) else layer.in_features * layer.out_features
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new.train(layer.training))
            converted[name] = self.backend.name
        if not converted:
            raise ConfigError(f"no selected layer fits {self.backend.name}: {next(iter(kept.values()))}; run in bf16")
        return ConversionReport(backend=self.backend.name, converted=converted, kept=kept, bytes_before=before, bytes_after=after)

    def _layer(self, name: str, layer: nn.Linear, given: PackedTensor | None) -> nn.Module:
        if self.prepare is not None:
            return self.prepare(name, layer)
        bias = None if layer.bias is None else layer.bias.to(self.device) if self.device else layer.bias
        weight = self._weight(layer) if given is None else given if self.device is None else given.to(self.device)
        kind = self.backend.name
        if kind == FP8:
            if not isinstance(weight, RowFP8):
                raise CheckpointError(f"{name} is stored as {weight.name} and fp8_quant computes FP8 weights; set model_quant: true, or give bf16 weights")
            return Fp8Linear(weight, bias)
        if not isinstance(weight, NVFP4):
            raise CheckpointError(f"{name} is stored as {weight.name} and model_quant computes NVFP4 weights; set fp8_quant: true, or give bf16 weights")
        if kind == W4A16:
            return W4A16Linear(weight, bias)
        if kind == W4A8:
            return W4A8Linear(weight, bias)
        return (NativeLinear if kind == NATIVE else EmulatedLinear)(weight, bias, self.activation_rule)

    def _weight(self, layer: nn.Linear) -> PackedTensor:
        weight = layer.weight if self.device is None else layer.weight.to(self.device)
        if self.backend.name == FP8:
            return Fp8Linear.of(weight, None).stored
        return nvfp4.quantise(weight, self.weight_rule, tile=self.tile)


def share_activation_scales(model: nn.Module, reduce: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Where a sample's tokens lie on several ranks: `reduce` makes a largest value [B] that of all of them, so that every rank quantises with one scale."""
    for layer in model.modules():
        if isinstance(layer, (EmulatedLinear, NativeLinear)):
            layer.share = reduce
