"""Packed NVFP4 as matrices, dense or FP8, in one pass at the speed of memory.

Memory bounds these kernels as long as a value takes few instructions (10 dense, 5 as FP8). Dense: a code's bits are moved to where a float32 has them, then
two products. FP8: E2M1 has 8 magnitudes, hence a group has 8 results; they are computed once, make a table of 8 bytes in two registers, and are picked from it
four at a time by the permutation of bytes (prmt), whose selectors have 4 bits as codes do. Results are those of the references bit for bit.

Legend: N rows, K values of a row (a multiple of 16); words of 8 codes, groups of 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .fp8 import RowFP8
from .nvfp4 import GROUP, NVFP4
from .triton_fp4 import e4m3_value

SIGNS = tl.constexpr(0x80808080 - 2**32)
MAGNITUDES = tl.constexpr(0x77777777)
LOW_FOUR, HIGH_FOUR = tl.constexpr(0x5140), tl.constexpr(0x7362)  # bytes of two words in turn: their lower, their upper halves
TILES, BLOCK = 2, 128  # loads on their way in a thread, threads of a program


@triton.jit
def picked(low, high, which):
    """Byte i is the byte of (low, high) that the lower three bits of the i-th half byte of `which` name; the fourth bit must be 0."""
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, which], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def e4m3_bytes(a, b, c, d):
    """Four float32 as E4M3, nearest, saturating, the first in the lowest byte."""
    return tl.inline_asm_elementwise(
        "{.reg .b16 x, y; cvt.rn.satfinite.e4m3x2.f32 x, $2, $1; cvt.rn.satfinite.e4m3x2.f32 y, $4, $3; mov.b32 $0, {x, y};}",
        "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def signs(word):
    """The signs of codes 0-3 and 4-7 of words, at the tops of bytes."""
    return picked(word << 4, word, LOW_FOUR) & SIGNS, picked(word << 4, word, HIGH_FOUR) & SIGNS


@triton.jit
def e4m3_words(word, low, high):
    """8 codes through the table (low, high): two words of E4M3."""
    first, second = signs(word)
    magnitudes = word & MAGNITUDES
    return picked(low, high, magnitudes) | first, picked(low, high, magnitudes >> 16) | second


@triton.jit
def fused_fp8(codes, scales, amax, row_scales, out, groups, PRODUCT: tl.constexpr, ROW_GROUPS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """E4M3 of (code * scale) * (decode scale / row scale). A thread is a group at a time, TILES times."""
    factor = tl.div_rn(tl.load(amax), PRODUCT)
    first = tl.program_id(0) * (TILES * BLOCK) + tl.arange(0, BLOCK)
    words, steps, ratios = (), (), ()
    for i in tl.static_range(TILES):
        at = first + i * BLOCK
        words = words + (tl.load(codes.to(tl.pointer_type(tl.int64), bitcast=True) + at, mask=at < groups, other=0),)
        steps = steps + (tl.load(scales + at, mask=at < groups, other=0),)
        ratios = ratios + (tl.div_rn(factor, tl.load(row_scales + at // ROW_GROUPS, mask=at < groups, other=1.0)),)
    for i in tl.static_range(TILES):
        at = first + i * BLOCK
        s, r = e4m3_value(steps[i]), ratios[i]
        low = e4m3_bytes(s * 0.0 * r, s * 0.5 * r, s * r, s * 1.5 * r)
        high = e4m3_bytes(s * 2.0 * r, s * 3.0 * r, s * 4.0 * r, s * 6.0 * r)
        a, b = e4m3_words(words[i].to(tl.int32), low, high)
        c, d = e4m3_words((words[i] >> 32).to(tl.int32), low, high)
        four = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK, 4))
        place = at[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(out.to(tl.pointer_type(tl.int32), bitcast=True) + place, four, mask=(at < groups)[:, None])


@triton.jit
def values(word):
    """The numbers of 8 codes times 2^-126, float32 [.., 8]: a code's sign, exponent and mantissa at their places in a float32."""
    top = word[:, None] << (28 - 4 * tl.arange(0, 8))[None, :]
    return (((top >> 6) & 0x01C00000) | (top & (-(2**31)))).to(tl.float32, bitcast=True)


@triton.jit
def fused_dense(codes, scales, amax, out, words, PRODUCT: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """(code * scale) * decode scale of the tensors along axis 1, `words` words each; PRODUCT 0: code * scale. A thread is a word at a time, TILES times."""
    start = tl.program_id(0).to(tl.int64) * (TILES * BLOCK)
    left = words - start
    start += tl.program_id(1).to(tl.int64) * words
    factor = 512.0
    if PRODUCT > 0:
        factor = tl.div_rn(tl.load(amax + tl.program_id(1)), PRODUCT) * 512.0
    given, steps = (), ()
    for i in tl.static_range(TILES):
        at = i * BLOCK + tl.arange(0, BLOCK)
        given = given + (tl.load(codes.to(tl.pointer_type(tl.int32), bitcast=True) + start + at, mask=at < left, other=0),)
        steps = steps + (tl.load(scales + (start + at) // 2, mask=at < left, other=0),)
    for i in tl.static_range(TILES):
        at = i * BLOCK + tl.arange(0, BLOCK)
        exact = values(given[i]) * (e4m3_value(steps[i]) * 1.661534994731145e35)[:, None]  # times 2^117: code * scale * 2^-9
        place = at[:, None] * 8 + tl.arange(0, 8)[None, :]
        tl.store(out + start * 8 + place, (exact * factor).to(out.dtype.element_ty), mask=(at < left)[:, None])


def dense_fused(t: NVFP4, dtype: torch.dtype, *, products: bool = False) -> torch.Tensor:
    """`t.dequantise(dtype)` [..., N, K], or `t.products().to(dtype)`."""
    *lead, rows, columns = t.shape
    out = torch.empty(t.shape, dtype=dtype, device=t.codes.device)
    words, tensors = rows * columns // 8, t.amax.numel()
    fused_dense[(triton.cdiv(words, TILES * BLOCK), tensors)](
        t.codes.contiguous(), t.linear().scales.contiguous(), t.amax.contiguous(), out, words,
        PRODUCT=0.0 if products else t.product, TILES=TILES, BLOCK=BLOCK, num_warps=BLOCK // 32, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def fp8_fused(w: NVFP4, scales: torch.Tensor) -> RowFP8:
    """`quant_matmul.as_fp8(w, scales)`."""
    rows, columns = w.shape
    out = torch.empty(w.shape, dtype=torch.uint8, device=w.codes.device)
    groups = rows * columns // GROUP
    fused_fp8[(triton.cdiv(groups, TILES * BLOCK),)](
        w.codes.contiguous(), w.linear().scales.contiguous(), w.amax.contiguous(), scales.contiguous(), out, groups,
        PRODUCT=w.product, ROW_GROUPS=columns // GROUP, TILES=TILES, BLOCK=BLOCK, num_warps=BLOCK // 32, enable_fp_fusion=False,
    )  # fmt: skip
    return RowFP8(out, scales, w.dtype)
