"""Quantising to NVFP4 in one pass.

It follows `nvfp4.quantise` operation by operation (divisions correctly rounded, no fused multiply-adds, sums over a group in order), so that
codes and scales are the same bits. A program of the quantiser holds some rows and their groups; it reads a group's 16 values one by one, which
keeps the order of sums and makes packing a matter of two neighbours.

Legend: R rows, K values of a row (a multiple of 16), G groups of 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .nvfp4 import GROUP, NVFP4, RULES
from .random_bits import seed_word

MEASURES = {None: 0, "mse": 1, "mae": 2, "abs_max": 3}


@triton.jit
def e2m1(y):
    """Codes (int32) of the nearest numbers, ties to the even code; the sign of what rounds to zero stays."""
    m = tl.abs(y)
    code = (m > 0.25).to(tl.int32) + (m >= 0.75).to(tl.int32) + (m > 1.25).to(tl.int32) + (m >= 1.75).to(tl.int32)
    code += (m > 2.5).to(tl.int32) + (m >= 3.5).to(tl.int32) + (m > 5.0).to(tl.int32)
    return code | ((y < 0.0).to(tl.int32) << 3)


@triton.jit
def e2m1_value(code):
    """float32 of codes 0..15 (int32)."""
    m = code & 7
    big = ((2 + (m & 1)) << tl.maximum((m >> 1) - 1, 0)).to(tl.float32) * 0.5
    return tl.where(m < 2, m.to(tl.float32) * 0.5, big) * tl.where((code & 8) != 0, -1.0, 1.0)  # a product: the sign of zero stays


@triton.jit
def e4m3_value(bits):
    return bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def to_e4m3(x):
    """(E4M3 bits as int32, their value) of x >= 0, saturating at 448."""
    narrow = tl.minimum(x, 448.0).to(tl.float8e4nv)
    return narrow.to(tl.uint8, bitcast=True).to(tl.int32), narrow.to(tl.float32)


@triton.jit
def mix(word):
    """`random_bits._mix` of uint32."""
    word = (word ^ (word >> 16)) * 0x21F0AAAD
    word = (word ^ (word >> 15)) * 0x735A2D97
    return word ^ (word >> 15)


@triton.jit
def random_24(start, row, column):
    """`random_bits.counter_bits` at rows and columns (below 2^32) of a tensor; `start` is what the seed makes of itself. float32 in [0, 1)."""
    by_row = mix((mix(row.to(tl.uint32)) * 0x85EBCA77) ^ start)
    bits = mix(mix(by_row + column.to(tl.uint32) * 0x9E3779B1) ^ start) >> 8
    return bits.to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def e2m1_stochastic(y, chance):
    """`fp4.encode_stochastic` with `chance` in [0, 1)."""
    m = tl.abs(y)
    below = (m >= 0.5).to(tl.int32) + (m >= 1.0).to(tl.int32) + (m >= 1.5).to(tl.int32)
    below += (m >= 2.0).to(tl.int32) + (m >= 3.0).to(tl.int32) + (m >= 4.0).to(tl.int32)
    steps = tl.where(below < 4, 2.0, tl.where(below < 6, 1.0, 0.5))
    share = tl.minimum((m - e2m1_value(below)) * steps, 1.0)
    return (below + (chance < share).to(tl.int32)) | ((y < 0.0).to(tl.int32) << 3)


@triton.jit
def floor_power(m):
    """The power of two at or below max(m, 1): numbers near m lie half of it apart."""
    return (tl.maximum(m, 1.0).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def nearest_magnitude(m):
    """`e2m1_value(e2m1(m))` of m >= 0: a sum with a number whose last bit is the distance of neighbours rounds as the codes do, ties to even."""
    m = tl.minimum(m, 6.0)
    large = floor_power(m) * 4194304.0
    return (m + large) - large


@triton.jit
def nearest(y):
    """`e2m1_value(e2m1(y))`; the sign of what rounds to zero stays."""
    return nearest_magnitude(tl.abs(y)) * tl.where(y < 0.0, -1.0, 1.0)


@triton.jit
def nearest_at_random(y, chance):
    """`e2m1_value(e2m1_stochastic(y, chance))`; all but the comparison is exact."""
    m = tl.minimum(tl.abs(y), 6.0)
    below = tl.where(m < 1.0, tl.where(m < 0.5, 0.0, 0.5), (m.to(tl.int32, bitcast=True) & -4194304).to(tl.float32, bitcast=True))
    step = floor_power(m) * 0.5
    m = tl.where(chance * step < m - below, below + step, below)
    return m * tl.where(y < 0.0, -1.0, 1.0)


@triton.jit
def candidate(largest, scale, factor, E: tl.constexpr, UP: tl.constexpr):
    """(E4M3 bits, value, factor on the data) of groups with the largest magnitude `largest`; UP: the scale is rounded up."""
    wanted = tl.div_rn(largest, E) * scale * factor
    bits, value = to_e4m3(wanted)
    if UP:
        bits = bits + (value < tl.minimum(wanted, 448.0)).to(tl.int32)
        value = e4m3_value(bits.to(tl.uint8))
    inverse = tl.minimum(tl.div_rn(1.0, value * tl.div_rn(1.0, scale)), 3.4028234663852886e38)
    return bits, value, tl.where(value == 0.0, 0.0, tl.where(scale == 0.0, 0.0, inverse))


@triton.jit
def quotient(x, D: tl.constexpr):
    """x / D, correctly rounded, for D = E M of a rule and |x| of at least 2^-125: the product with the inverse, mended by its remainder. Infinity stays."""
    INVERSE: tl.constexpr = 1.0 / D
    near = x * INVERSE
    return tl.where(finite(x), tl.fma(tl.fma(near, -D, x), INVERSE, near), x)


@triton.jit
def error_term(x, inverse, value, amax, PRODUCT: tl.constexpr, MEASURE: tl.constexpr):
    """How far x is from what nearest rounding keeps of it, from magnitudes alone."""
    m = tl.abs(x)
    kept = nearest_magnitude(m * inverse) * value * amax
    if MEASURE == 1:
        apart = quotient(kept, PRODUCT) - m  # where the quotient is one bit off, the square is 0 or that of x
        term = apart * apart
    else:
        term = tl.abs(tl.div_rn(kept, PRODUCT) - m)
    return term


@triton.jit
def joined(total, term, MEASURE: tl.constexpr):
    if MEASURE == 3:
        total = tl.maximum(total, term)
    else:
        total = total + term
    return total


@triton.jit
def finite(x):
    return tl.abs(x) <= 3.4028234663852886e38


@triton.jit
def value_at(x, at, i: tl.constexpr, mean, at_mean, MEAN: tl.constexpr, inside):
    """Value i of every group, float32, less the mean of its feature where MEAN; what is not finite stays so."""
    v = tl.load(x + at + i, mask=inside, other=0.0).to(tl.float32)
    if MEAN:
        v = v - tl.load(mean + at_mean + i, mask=inside, other=0.0)
    return v


@triton.jit
def store_groups(
    x, at, mean, at_mean, inside, amax, codes, at_codes, scales, at_scales, start, row, column,
    E: tl.constexpr, M: tl.constexpr, MEASURE: tl.constexpr, MEAN: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Quantises the groups of 16 that begin at `x + at`, with the amax of their tensor, and stores their 8 bytes and their scale.

    With MEAN, `mean + at_mean` is where the features of each group begin in a row that is subtracted first. With STOCHASTIC, bits come from `start` and
    the group's place, `row` and `column`.
    """
    PRODUCT: tl.constexpr = E * M
    scale = tl.where(amax * (3.4028234663852886e38 / PRODUCT) > 1.0, tl.div_rn(amax * 0.0 + PRODUCT, amax), 0.0)
    largest = tl.zeros_like(at).to(tl.float32)
    fine = inside
    for i in tl.static_range(16):
        v = value_at(x, at, i, mean, at_mean, MEAN, inside)
        fine = fine & finite(v)
        largest = tl.maximum(largest, tl.abs(v))
    largest = tl.where(fine, largest, 0.0)
    bits, value, inverse = candidate(largest, scale, 1.0, E, STOCHASTIC)
    if MEASURE > 0:
        bits_4, value_4, inverse_4 = candidate(largest, scale, 1.5, E, STOCHASTIC)
        six, four = tl.zeros_like(largest), tl.zeros_like(largest)
        for i in tl.static_range(16):
            v = tl.where(fine, value_at(x, at, i, mean, at_mean, MEAN, inside), 0.0)
            six = joined(six, error_term(v, inverse, value, amax, PRODUCT, MEASURE), MEASURE)
            four = joined(four, error_term(v, inverse_4, value_4, amax, PRODUCT, MEASURE), MEASURE)
        better = four < six
        bits, inverse = tl.where(better, bits_4, bits), tl.where(better, inverse_4, inverse)
    first, second = tl.zeros_like(bits), tl.zeros_like(bits)  # a group's 8 bytes as two words
    for i in tl.static_range(8):
        low = tl.where(fine, value_at(x, at, 2 * i, mean, at_mean, MEAN, inside), 0.0)
        high = tl.where(fine, value_at(x, at, 2 * i + 1, mean, at_mean, MEAN, inside), 0.0)
        if STOCHASTIC:
            byte = e2m1_stochastic(low * inverse, random_24(start, row, column + 2 * i))
            byte = byte | (e2m1_stochastic(high * inverse, random_24(start, row, column + 2 * i + 1)) << 4)
        else:
            byte = e2m1(low * inverse) | (e2m1(high * inverse) << 4)
        if i < 4:
            first = first | (byte << (8 * i))
        else:
            second = second | (byte << (8 * i - 32))
    words = codes.to(tl.pointer_type(tl.int32), bitcast=True) + at_codes // 4
    tl.store(words, first, mask=inside)
    tl.store(words + 1, second, mask=inside)
    tl.store(scales + at_scales, tl.where(fine, bits, 0x7F).to(tl.uint8), mask=inside)


@triton.jit
def fused_largest(x, amax, count, BLOCK: tl.constexpr):
    """Largest finite |x| of each of B tensors of `count` values, by atomic maxima over the bits of numbers that are not negative."""
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + b * count + at, mask=at < count, other=0.0).to(tl.float32)
    largest = tl.max(tl.where(finite(v), tl.abs(v), 0.0), 0)
    tl.atomic_max(amax + b, largest.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["start"])
def fused_quantise(
    x, amax, codes, scales, groups, row_groups, start,
    E: tl.constexpr, M: tl.constexpr, MEASURE: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """B tensors of `groups` groups each, one behind another; rows count through all of them."""
    b = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < groups
    at = b * groups + group
    row, column = at // row_groups, at % row_groups * 16
    word = (tl.zeros_like(row).to(tl.int32) + start).to(tl.uint32, bitcast=True)
    store_groups(x, at * 16, x, at, inside, tl.load(amax + b), codes, at * 8, scales, at, word, row, column, E, M, MEASURE, False, STOCHASTIC)


def signed(word: int) -> int:
    """The 32 bits of `word` as a signed number, which a kernel takes as 32 bits whatever their value."""
    return word - 2**32 if word >= 2**31 else word


def quantise_fused(x: torch.Tensor, rule: str, *, amax: torch.Tensor | None = None, seed: int | None = None) -> NVFP4:
    """`nvfp4.quantise(x, rule, amax=amax, on_nonfinite="nan")` for x [B, R, K] on a GPU, K a multiple of 16; `seed`: with the bits of `counter_bits(seed)`."""
    x = x.contiguous()
    batch, rows, columns = x.shape
    if amax is None:
        bits = torch.zeros(batch, dtype=torch.int32, device=x.device)
        fused_largest[(triton.cdiv(rows * columns, 8192), batch)](x, bits, rows * columns, BLOCK=8192, num_warps=8)
        amax = bits.view(torch.float32)
    else:
        amax = amax.to(torch.float32).contiguous()
    codes = torch.empty(batch, rows, columns // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(batch, rows, columns // GROUP, dtype=torch.uint8, device=x.device)
    groups, how = rows * columns // GROUP, RULES[rule]
    fused_quantise[(triton.cdiv(groups, 128), batch)](
        x, amax, codes, scales, groups, columns // GROUP, 0 if seed is None else signed(seed_word(seed)),
        E=how.code, M=how.scale, MEASURE=MEASURES[how.error], STOCHASTIC=seed is not None, BLOCK=128, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return NVFP4(codes, scales, amax, rule, 1, tuple(x.shape), x.dtype)
