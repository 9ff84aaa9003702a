"""NVFP4 x NVFP4 and products with NVFP4 weights: on FP4 tensor cores, and the same numbers where there are none.

`native` hands packed operands to cuBLASLt; `emulated` multiplies code x scale, which is exact in bfloat16, adds in float32 and applies alpha, the product of
both decode scales, to the finished sum. The two differ in the order of addition only (spec nvfp4 §1.5, §6.3).

Legend: B independent tensors with an amax each, M rows of activations, N output features, K values summed over.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from . import nvfp4
from .fp8 import RowFP8
from .nvfp4 import GROUP, NVFP4, rule_named
from .quant_matmul import as_fp8
from .random_bits import counter_bits
from .triton_available import fused_fp8


def wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b^T in float32 of operands that are exact in bfloat16: one product of bfloat16 matrices on a GPU, of float32 ones elsewhere."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda:
            return torch.mm(a.to(torch.bfloat16), b.to(torch.bfloat16).t(), out_dtype=torch.float32)
        return a.to(torch.float32) @ b.to(torch.float32).t()


def wide_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same of a batch: [B, M, N] of [B, M, K] and [B, N, K]."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda:
            return torch.bmm(a.to(torch.bfloat16), b.to(torch.bfloat16).transpose(1, 2), out_dtype=torch.float32)
        return a.to(torch.float32) @ b.to(torch.float32).transpose(1, 2)


def quantised_activation(x: torch.Tensor, rule: str, amax: torch.Tensor | None = None, seed: int | None = None) -> NVFP4:
    """`x` [B, M, K] in NVFP4 with an amax for each of B (`amax` float32 [B]: of a whole of which x is a part); no wait for the device, NaN stays NaN.

    `seed`: round stochastically, with the bits that belong to seed and place.
    """
    if fused_fp8(x) and x.shape[-1] % GROUP == 0:
        from .triton_fp4 import quantise_fused

        return quantise_fused(x, rule_named(rule), amax=amax, seed=seed)
    bits = None if seed is None else counter_bits(seed, x.shape, device=x.device)
    return nvfp4.quantise(x, rule, amax=amax, bits=bits, on_nonfinite="nan")


def quantised_weight(w: torch.Tensor, rule: str, tile: int) -> NVFP4:
    """`nvfp4.quantise(w, rule, tile=tile, on_nonfinite="nan")` of w [N, K]; no wait for the device."""
    if fused_fp8(w) and not (w.shape[0] % GROUP or w.shape[1] % GROUP):
        from .triton_fp4 import quantise_fused
        from .triton_fp4_training import tiles_fused

        if tile == GROUP:
            return tiles_fused(w, rule_named(rule))
        t = quantise_fused(w[None], rule_named(rule))
        return replace(t, codes=t.codes[0], scales=t.scales[0], amax=t.amax[0], shape=tuple(w.shape))
    return nvfp4.quantise(w, rule, tile=tile, on_nonfinite="nan")


def _unpacks(t: NVFP4) -> bool:
    """Whether the fused kernels take this tensor: on a card that has them, rows of whole groups."""
    return fused_fp8(t.codes) and t.shape[-1] % GROUP == 0


def products(t: NVFP4, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[..., R, K]: code * scale, which `dtype` holds exactly."""
    if _unpacks(t):
        from .triton_packed import dense_fused

        return dense_fused(t, dtype, products=True)
    return t.products().to(dtype)


def dequantised(w: NVFP4, dtype: torch.dtype) -> torch.Tensor:
    """`w.dequantise(dtype)`, in one pass on a GPU."""
    if _unpacks(w):
        from .triton_packed import dense_fused

        return dense_fused(w, dtype)
    return w.dequantise(dtype)


def as_rows(w: NVFP4, scales: torch.Tensor) -> RowFP8:
    """`quant_matmul.as_fp8(w, scales)`, in one pass on a GPU."""
    if _unpacks(w):
        from .triton_packed import fp8_fused

        return fp8_fused(w, scales)
    return as_fp8(w, scales)


def emulated(a: NVFP4, w: NVFP4, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """[B, M, N] in `dtype` from activations [B, M, K] and weights [N, K]."""
    batch, rows, inner = a.shape
    total = wide_product(products(a).reshape(batch * rows, inner), products(w)).unflatten(0, (batch, rows))
    total = total * (a.decode_scale * w.decode_scale)[:, None, None]
    return (total if bias is None else total + bias.to(torch.float32)).to(dtype)


def native(a: NVFP4, w: NVFP4, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """As `emulated`, on FP4 tensor cores. `w` best has swizzled scales. `dtype` bfloat16 or float16 is that of the cores' own output."""
    kinds = F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise
    orders = F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE
    out_dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    weights = w.swizzled()
    a = a.swizzled()
    outs = [
        F.scaled_mm(
            codes.view(torch.float4_e2m1fn_x2),
            weights.codes.view(torch.float4_e2m1fn_x2).t(),
            scale_a=[scales.view(torch.float8_e4m3fn), scale.reshape(())],
            scale_recipe_a=list(kinds),
            scale_b=[weights.scales.view(torch.float8_e4m3fn), weights.decode_scale.reshape(())],
            scale_recipe_b=list(kinds),
            swizzle_a=list(orders),
            swizzle_b=list(orders),
            bias=None if bias is None else bias.to(out_dtype),
            output_dtype=out_dtype,
        )
        for codes, scales, scale in zip(a.codes, a.scales, a.decode_scale)
    ]
    return torch.stack(outs).to(dtype)
