"""Linear layers that train in low precision. Parameters, their names and the optimizer's masters stay; only the products change.

    Nvfp4Trained   all three products in NVFP4 (`ops.fp4_training`); weights are quantised once an optimizer step
    Nvfp4Frozen    packed weights without masters under a LoRA, or of a teacher: forward and gradient of the input in NVFP4
    Fp8Trained     all three products in FP8, one scale a row; the fast path on Ada and Hopper

Compiled blocks leave these layers as they are: seeds and versions would compile anew at every step.
Random bits are a function of (seed of the micro-step, layer, product, place), so that a resumed or recomputed step rounds as it did.
(Spec nvfp4 §6, training §7.)

Legend: B samples, M tokens, K features in, N features out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..core.errors import ConfigError
from ..ops import nvfp4
from ..ops.fp4_matmul import quantised_weight
from ..ops.fp4_training import DGRAD, WGRAD, Recipe, coded, input_gradient, largest, of_packed, times, weight_gradient
from ..ops.fp8_matmul import MULTIPLE, fp8_product, quantised_rows
from ..ops.nvfp4 import NVFP4
from .backends import BACKENDS, FP8
from .converter import ConversionReport, Selection, unfit
from .linear import EmulatedLinear

NVFP4_TRAINED, NVFP4_FROZEN, FP8_TRAINED = "nvfp4 trained", "nvfp4 frozen", "fp8 trained"
TRAINED_AS = "trained_as"  # key of a checkpoint's metadata


@dataclass(eq=False)
class Moment:
    """What all layers of a network share: the seed of the running micro-step, the version of its weights, and who else holds tokens of its samples.

    `reduce` makes a largest value [B] that of all ranks that share the samples; None: this rank has them whole.
    """

    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
    seed: int = 0
    weights: int = 0
    layers: int = field(default=0)

    def begin(self, seed: int) -> None:
        """A micro-step begins: the noise of its roundings is that of `seed`."""
        self.seed = seed

    def weights_changed(self) -> None:
        """An optimizer stepped, or other weights were put in place: packed ones are made anew at their next use."""
        self.weights += 1

    def seed_of(self, layer: int, product: int) -> int:
        """A 64-bit seed for one product of one layer."""
        return (self.seed * 0x9E3779B97F4A7C15 + layer * 2 + product + 1) & (2**63 - 1)


def _samples(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, *x.shape[-2:]) if x.dim() > 2 else x.reshape(1, -1, x.shape[-1])


def _dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class TrainedLinear(nn.Linear):
    """An `nn.Linear` with the parameters of another one. `number` is its place among the layers of its network."""

    def __init__(self, layer: nn.Linear, moment: Moment):
        super().__init__(1, 1, device="meta")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.moment, self.number = moment, moment.layers
        moment.layers += 1


class Nvfp4Trained(TrainedLinear):
    """See the module. The packed weights are kept until `Moment.weights_changed`; they are no part of the state dict."""

    def __init__(self, layer: nn.Linear, moment: Moment, recipe: Recipe):
        super().__init__(layer, moment)
        self.recipe = recipe
        self._packed: tuple[int, int, NVFP4] | None = None

    @torch.no_grad()
    def packed(self) -> NVFP4:
        """The weights of this optimizer step in NVFP4."""
        version = self.moment.weights, self.weight._version
        if self._packed is None or self._packed[:2] != version or self._packed[2].device != self.weight.device:
            made = quantised_weight(self.weight, self.recipe.weight_rule, self.recipe.tile)
            self._packed = (*version, made)
        return self._packed[2]

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Nvfp4Product.apply(_samples(x), self.weight, self.bias, self, _dtype(x)).reshape(*x.shape[:-1], self.out_features)


class _Nvfp4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BMK: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: Nvfp4Trained, dtype: torch.dtype) -> torch.Tensor:
        packed, x, recipe = layer.packed(), x_BMK.to(dtype), layer.recipe
        amax, ctx.turned = largest(x, recipe, tokens=ctx.needs_input_grad[1])
        ctx.layer, ctx.packed, ctx.seed, ctx.input = layer, packed, layer.moment.seed, x_BMK.dtype
        ctx.save_for_backward(x, weight if recipe.tile == 1 else None)
        return times(coded(x, recipe.activation_rule, amax, layer.moment.reduce), of_packed(packed), bias, dtype)

    @staticmethod
    def backward(ctx, dy_BMN: torch.Tensor):
        layer, (x, weight) = ctx.layer, ctx.saved_tensors
        recipe, reduce = layer.recipe, layer.moment.reduce
        moment = Moment(seed=ctx.seed)
        amax, turned = largest(dy_BMN, recipe, tokens=ctx.needs_input_grad[1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(dy_BMN, amax, ctx.packed, weight, recipe, moment.seed_of(layer.number, DGRAD), reduce, ctx.input)
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(dy_BMN, x, turned, ctx.turned, recipe, moment.seed_of(layer.number, WGRAD), reduce).to(layer.weight.dtype)
        if ctx.needs_input_grad[2]:
            db = dy_BMN.sum((0, 1), dtype=torch.float32).to(layer.bias.dtype)
        return dx, dw, db, None, None


class Nvfp4Frozen(EmulatedLinear):
    """Packed weights without masters. Gradients of the input are quantised as in `Nvfp4Trained`; the LoRA beside it stays as it is."""

    backend = NVFP4_FROZEN
    intake = None

    def __init__(self, weight: NVFP4, bias: torch.Tensor | None, recipe: Recipe, moment: Moment):
        super().__init__(weight, bias, recipe.activation_rule)
        self.recipe, self.moment, self.number = recipe, moment, moment.layers
        moment.layers += 1

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FrozenProduct.apply(_samples(x), self, _dtype(x)).reshape(*x.shape[:-1], self.out_features)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BMK: torch.Tensor, layer: Nvfp4Frozen, dtype: torch.dtype) -> torch.Tensor:
        ctx.layer, ctx.seed, ctx.input = layer, layer.moment.seed, x_BMK.dtype
        x, recipe = x_BMK.to(dtype), layer.recipe
        a = coded(x, recipe.activation_rule, largest(x, recipe, tokens=False)[0], layer.moment.reduce)
        return times(a, of_packed(layer.weight4()), layer.bias, dtype)

    @staticmethod
    def backward(ctx, dy_BMN: torch.Tensor):
        layer, recipe = ctx.layer, ctx.layer.recipe
        seed, amax = Moment(seed=ctx.seed).seed_of(layer.number, DGRAD), largest(dy_BMN, recipe, tokens=False)[0]
        return input_gradient(dy_BMN, amax, layer.weight4(), None, recipe, seed, layer.moment.reduce, ctx.input), None, None


class Fp8Trained(TrainedLinear):
    """See the module. Rows are scaled one by one, so that shards of tokens need nothing of each other."""

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Fp8Product.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias, _dtype(x)).reshape(*x.shape[:-1], self.out_features)


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MK: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        ctx.input, ctx.bias = x_MK.dtype, None if bias is None else bias.dtype
        x = x_MK.to(dtype)
        ctx.save_for_backward(x, weight)
        return fp8_product(quantised_rows(x), quantised_rows(weight), bias)

    @staticmethod
    def backward(ctx, dy_MN: torch.Tensor):
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = fp8_product(quantised_rows(dy_MN.contiguous()), quantised_rows(weight.t().contiguous()), fast=False).to(ctx.input)
        if ctx.needs_input_grad[1]:
            fill = (0, -len(x) % MULTIPLE)  # the product sums over tokens, in whole steps of the tensor cores
            dy, rows = (quantised_rows(F.pad(t.t(), fill).contiguous()) for t in (dy_MN, x))
            dw = fp8_product(dy, rows, fast=False).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = dy_MN.sum(0, dtype=torch.float32).to(ctx.bias)
        return dx, dw, db, None


@dataclass(frozen=True, kw_only=True)
class TrainingConverter:
    """Makes the selected layers of a network train in `kind`, in FP8 less those that FP8 spares. `frozen`: packed weights without masters.

    Satisfies `converter.Converter`.
    """

    kind: str
    recipe: Recipe = Recipe()
    selection: Selection = Selection()
    frozen: bool = False
    moment: Moment = field(default_factory=Moment)

    def convert(self, model: nn.Module, spec: Any) -> ConversionReport:
        """Replaces layers in place; masters stay parameters unless `frozen`. Raises ConfigError for an empty selection."""
        names, kept, before, after = self.selection.names(model, spec), {}, 0, 0
        for name in list(names):
            layer = model.get_submodule(name)
            reason = unfit(BACKENDS[FP8], self.selection, name, layer) if self.kind == FP8_TRAINED else None
            if reason is not None:
                kept[name] = reason
                names.remove(name)
                continue
            new = self._layer(layer)
            before, after = before + layer.weight.nbytes, after + sum(t.nbytes for t in (*new.parameters(), *new.buffers()))
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new.train(layer.training))
        if not names:
            raise ConfigError(f"no selected layer fits {self.kind}: {next(iter(kept.values()))}; train in bf16")
        return ConversionReport(backend=self.kind, converted=dict.fromkeys(names, self.kind), kept=kept, bytes_before=before, bytes_after=after)

    def _layer(self, layer: nn.Linear) -> nn.Module:
        if self.kind == FP8_TRAINED:
            return Fp8Trained(layer, self.moment)
        if self.frozen:
            packed = nvfp4.quantise(layer.weight.detach(), self.recipe.weight_rule, tile=self.recipe.tile)
            return Nvfp4Frozen(packed, layer.bias, self.recipe, self.moment)
        return Nvfp4Trained(layer, self.moment, self.recipe)

    def metadata(self) -> dict[str, str]:
        """What a checkpoint says of how it was trained."""
        about = {"kind": self.kind} | ({} if self.kind == FP8_TRAINED else asdict(self.recipe))
        return {TRAINED_AS: json.dumps(about)}


def weights_changed(model: nn.Module) -> None:
    """To be called after every optimizer step: what was packed of the weights before is made anew."""
    for moment in {id(m.moment): m.moment for m in model.modules() if isinstance(m, Nvfp4Trained)}.values():
        moment.weights_changed()
