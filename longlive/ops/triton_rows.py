"""FP8 with one scale a row, in one pass over a row; with the GELU before it, where a product's output goes into the next product.

A program is a row. The numbers are those of `fp8.quantise_rows`; the GELU is rounded to the type of `x` before it is quantised, as in the reference.

Legend: M rows, K values of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .fp8 import RowFP8


@triton.jit
def saturated(v):
    """`v` within the range of E4M3; NaN stays NaN, which a minimum or maximum would make a number."""
    return tl.where(v == v, tl.minimum(tl.maximum(v, -448.0), 448.0), v)


@triton.jit
def store_row(v, inside, codes, scales, row, col, K: tl.constexpr):
    """Quantises the float32 row `v` (0 outside): E4M3 bits to `codes`, its scale to `scales`. Infinity or NaN: scale NaN, codes 0."""
    size = tl.abs(v)
    broken = tl.max((size > 3.4028234663852886e38).to(tl.int32) + (v != v).to(tl.int32), 0) > 0
    amax = tl.max(size, 0)
    scale = tl.where(amax == 0.0, 1.0, tl.maximum(tl.div_rn(amax, 448.0), 1.1754943508222875e-38))
    scaled = saturated(tl.div_rn(v, scale))
    bits = tl.where(broken, 0.0, scaled).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(codes + row * K + col, bits, mask=inside)
    tl.store(scales + row, tl.where(broken, float("nan"), scale))


@triton.jit
def fused_rows(x, codes, scales, stride, K: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < K
    v = tl.load(x + row * stride + col, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        twice = 1.5957691216057308 * (v + 0.044715 * v * v * v)  # 2 sqrt(2 / pi) (v + ...): (1 + tanh(u)) / 2 = sigmoid(2 u)
        v = (v * tl.sigmoid(twice)).to(x.dtype.element_ty).to(tl.float32)
    store_row(v, inside, codes, scales, row, col, K)


def _rows(x: torch.Tensor, gelu: bool) -> RowFP8:
    K = x.shape[-1]
    flat = x.reshape(-1, K)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(len(flat), 1, dtype=torch.float32, device=x.device)
    warps = 16 if K > 8192 else 8 if K > 1024 else 4
    fused_rows[(len(flat),)](flat, codes, scales, flat.stride(0), K=K, BLOCK=triton.next_power_of_2(K), GELU=gelu, num_warps=warps, enable_fp_fusion=gelu)
    return RowFP8(codes.reshape(x.shape), scales.reshape(*x.shape[:-1], 1), x.dtype)


def quantise_rows_fused(x: torch.Tensor) -> RowFP8:
    """`fp8.quantise_rows(x, on_nonfinite="nan")` for x [..., K] on a GPU."""
    return _rows(x, False)


def gelu_rows_fused(x: torch.Tensor) -> RowFP8:
    """The same of GELU (tanh form) of x."""
    return _rows(x, True)
