"""FP8 with one scale a row, in one pass over a row; with the GELU before it, where a product's output goes into the next product.

A program is a row, in registers as tiles of a power of two values, since rows are seldom a power of two long. Without GELU the numbers are those of
`fp8.quantise_rows`. What is quantised of the GELU is its float32.

Legend: M rows, K values of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .fp8 import RowFP8


@triton.jit
def saturated(v):
    """`v` within the range of E4M3; NaN stays NaN, which a minimum or maximum would make a number."""
    return tl.where(v == v, tl.minimum(tl.maximum(v, -448.0), 448.0), v)


@triton.jit
def larger(a, b):
    """The larger of two; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_row(x, K: tl.constexpr, TILE: tl.constexpr):
    """The K values at `x` as tiles, in their own type; 0 beyond K."""
    tiles = ()
    for start in tl.static_range(0, K, TILE):
        col = start + tl.arange(0, TILE)
        if start + TILE <= K:
            tiles = tiles + (tl.load(x + col),)
        else:
            tiles = tiles + (tl.load(x + col, mask=col < K, other=0.0),)
    return tiles


@triton.jit
def store_tile(x, tile, i: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    """Tile `i` of the row at `x`."""
    col = i * TILE + tl.arange(0, TILE)
    if (i + 1) * TILE <= K:
        tl.store(x + col, tile)
    else:
        tl.store(x + col, tile, mask=col < K)


@triton.jit
def sum_row(tiles):
    """Of all values of a row."""
    total = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        total += tiles[i]
    return tl.sum(total, 0)


@triton.jit
def store_rows(tiles, codes, scales, row, K: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr):
    """Quantises a row, given as float32 tiles that are 0 beyond K: E4M3 bits to `codes`, its scale to `scales`. Infinity or NaN: scale NaN, codes 0.

    Quotients are products with the inverse of the scale; `EXACT` mends their last bit (by their remainder), so that ties fall as in a division.
    """
    size = tl.abs(tiles[0])
    for i in tl.static_range(1, len(tiles)):
        size = larger(size, tl.abs(tiles[i]))
    amax = tl.reduce(size, 0, larger)
    whole = amax <= 3.4028234663852886e38
    scale = tl.where(amax == 0.0, 1.0, tl.maximum(tl.div_rn(amax, 448.0), 1.1754943508222875e-38))
    inverse = tl.div_rn(1.0, scale)
    codes += row * K
    kept = tl.where(whole, K, 0)
    for i in tl.static_range(len(tiles)):
        quotient = tiles[i] * inverse
        if EXACT:
            quotient = tl.fma(tl.fma(quotient, scale, -tiles[i]), -inverse, quotient)  # signed so that -0 stays -0
        bits = quotient.to(tl.float8e4nv).to(tl.uint8, bitcast=True)  # at most 448 by the choice of the scale
        col = i * TILE + tl.arange(0, TILE)
        tl.store(codes + col, bits, mask=col < kept)
    tl.store(scales + row, tl.where(whole, scale, float("nan")))
    if not whole:
        for i in tl.static_range(len(tiles)):
            store_tile(codes, tl.zeros([TILE], tl.uint8), i, K, TILE)


@triton.jit
def gelu(v):
    """v (1 + tanh(u)) / 2 = v / (1 + exp(-2 u)) with u = sqrt(2 / pi) (v + 0.044715 v^3); the constants hold -2 log2(e) too."""
    power = v * (-2.302208198 - 0.1029432397 * v * v)
    return libdevice.fast_dividef(v, 1.0 + libdevice.exp2(power))


@triton.jit
def fused_rows(x, codes, scales, stride, K: tl.constexpr, TILE: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    given, tiles = load_row(x + row * stride, K, TILE), ()
    for i in tl.static_range(len(given)):
        v = given[i].to(tl.float32)
        if GELU:
            v = gelu(v)
        tiles = tiles + (v,)
    store_rows(tiles, codes, scales, row, K, TILE, not GELU)


def row_tiles(K: int) -> dict[str, int]:
    """How a program takes a row: tiles of 16 bytes (of a 2-byte type) a thread, and few enough threads that several rows are on their way at once."""
    tile = max(32, min(triton.next_power_of_2(K), 1024 if K <= 4096 else 2048))
    return {"TILE": tile, "num_warps": max(1, tile // 256)}


def _rows(x: torch.Tensor, gelu: bool) -> RowFP8:
    K = x.shape[-1]
    flat = x.reshape(-1, K)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(len(flat), 1, dtype=torch.float32, device=x.device)
    fused_rows[(len(flat),)](flat, codes, scales, flat.stride(0), K=K, GELU=gelu, **row_tiles(K))
    return RowFP8(codes.reshape(x.shape), scales.reshape(*x.shape[:-1], 1), x.dtype)


def quantise_rows_fused(x: torch.Tensor) -> RowFP8:
    """`fp8.quantise_rows(x, on_nonfinite="nan")` for x [..., K] on a GPU."""
    return _rows(x, False)


def gelu_rows_fused(x: torch.Tensor) -> RowFP8:
    """The same of the float32 GELU (tanh form) of x."""
    return _rows(x, True)
