"""Linear layers with quantised weights. One class for each way to compute; what they share is how weights are kept.

Weights are `Packed`: frozen buffers of integers, so that no `.to(dtype)` of the model changes them and no optimizer finds them. The bias stays a
parameter of the model. `in_features` and `out_features` are those of the layer that was replaced, so that live LoRA branches stand beside it as before.
Gradients reach the input (the frozen weights have none): dx = dy W with W as it is read (spec nvfp4 §3, §8.1).

Legend: B batch, M rows, K features in, N features out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..ops import fp4_matmul
from ..ops.fp8 import RowFP8, quantise_rows
from ..ops.fp8_matmul import fp8_product, quantised_rows
from ..ops.intake import Groups, Intake, Rows
from ..ops.nvfp4 import LINEAR, NVFP4, SWIZZLED
from ..ops.packed import Packed, PackedTensor
from ..ops.quant_matmul import fp8_row_scales

Reduce = Callable[[torch.Tensor], torch.Tensor]


class QuantisedLinear(nn.Module):
    """y = x W^T + b with W quantised. `backend` is its name in `precision.backends`."""

    backend = ""
    intake: Intake | None = None

    def __init__(self, weight: PackedTensor, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = Packed(weight)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def stored(self) -> PackedTensor:
        """The weights as they are kept."""
        return self.packed.tensor

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """[N, K]: the weights' values in `dtype`."""
        return self.stored.dequantise(dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output in the dtype of `x` [..., K], without gradients."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, torch.Tensor) and torch.is_grad_enabled() and x.requires_grad:
            return _Frozen.apply(x, self)
        return self.product(x)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.backend}"


class _Frozen(torch.autograd.Function):
    """The product of a frozen layer; the gradient passes through the weights as they are."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: QuantisedLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(x.detach())

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad @ ctx.layer.dense(grad.dtype), None


class Fp8Linear(QuantisedLinear):
    """FP8 weights (a scale for each output feature) and FP8 activations (a scale for each token)."""

    backend, intake = "fp8", Rows()

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Fp8Linear:
        return cls(quantise_rows(weight), bias)

    def rows(self) -> RowFP8:
        """The weights without the checks of `stored`."""
        scales = self.packed.scales.view(torch.float32)
        return RowFP8(self.packed.codes, scales, torch.bfloat16)

    def product(self, x: torch.Tensor | RowFP8) -> torch.Tensor:
        a = x if isinstance(x, RowFP8) else quantised_rows(x)
        return fp8_product(a, self.rows(), self.bias)


class Nvfp4Linear(QuantisedLinear):
    """NVFP4 weights, linear scales."""

    def __init__(self, weight: NVFP4, bias: torch.Tensor | None):
        super().__init__(weight.linear(), bias)
        self._rule, self._tile = weight.rule, weight.tile

    def weight4(self, layout: str = LINEAR) -> NVFP4:
        """The weights without the checks of `stored`."""
        p = self.packed
        shape = (self.out_features, self.in_features)
        return NVFP4(p.codes, p.scales, p.amax.view(torch.float32), self._rule, self._tile, shape, torch.bfloat16, layout)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return fp4_matmul.dequantised(self.weight4(), dtype)


class W4A16Linear(Nvfp4Linear):
    """Weights become dense for each product and are given back after it."""

    backend = "w4a16"

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dense(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class W4A8Linear(Nvfp4Linear):
    """Weights become FP8 rows for each product; their row scales are known from the start."""

    backend, intake = "w4a8", Rows()

    def __init__(self, weight: NVFP4, bias: torch.Tensor | None):
        super().__init__(weight, bias)
        self.register_buffer("row_scales", fp8_row_scales(weight).view(torch.int32))

    def product(self, x: torch.Tensor | RowFP8) -> torch.Tensor:
        a = x if isinstance(x, RowFP8) else quantised_rows(x)
        return fp8_product(a, fp4_matmul.as_rows(self.weight4(), self.row_scales.view(torch.float32)), self.bias)


class W4A4Linear(Nvfp4Linear):
    """NVFP4 activations too, quantised by `activation_rule` with one amax a sample. `share`: makes the amax of a part that of the whole."""

    def __init__(self, weight: NVFP4, bias: torch.Tensor | None, activation_rule: str):
        super().__init__(weight, bias)
        self.activation_rule = activation_rule
        self.share: Reduce | None = None

    @property
    def intake(self) -> Groups:
        return Groups(self.activation_rule, self.share)

    def multiply(self, a: NVFP4, dtype: torch.dtype) -> torch.Tensor:
        raise NotImplementedError

    def product(self, x: torch.Tensor | NVFP4) -> torch.Tensor:
        if isinstance(x, NVFP4):
            return self.multiply(x, x.dtype)
        return self.multiply(self.intake.of(x), x.dtype).reshape(*x.shape[:-1], self.out_features)


class EmulatedLinear(W4A4Linear):
    """The numbers of FP4 tensor cores, anywhere."""

    backend = "emulated"

    def multiply(self, a: NVFP4, dtype: torch.dtype) -> torch.Tensor:
        return fp4_matmul.emulated(a, self.weight4(), self.bias, dtype)


class NativeLinear(W4A4Linear):
    """FP4 tensor cores. The scales are kept a second time in the order that the cores read (1/9 of the weights' bytes)."""

    backend = "native"

    def __init__(self, weight: NVFP4, bias: torch.Tensor | None, activation_rule: str):
        super().__init__(weight, bias, activation_rule)
        self.register_buffer("swizzled", weight.swizzled().scales)

    def multiply(self, a: NVFP4, dtype: torch.dtype) -> torch.Tensor:
        w = self.weight4(SWIZZLED)
        w = NVFP4(w.codes, self.swizzled, w.amax, w.rule, w.tile, w.shape, w.dtype, SWIZZLED)
        return fp4_matmul.native(a, w, self.bias, dtype)
