"""Kernels of training in NVFP4: quantised operands as code * scale, which is all that an emulated product reads, and the ends of those products.

They follow `nvfp4.quantise` operation by operation, as `triton_fp4` does, and give its bits. A thread holds the 16 values of a group, so that sums over a
group have their order. Groups along features are dealt out from a tile that is read in whole lines. Groups along tokens are 16 neighbouring lines, turned by
the Hadamard transform and stored where they lie: nothing is transposed in memory, since products read either side by columns as fast as by rows.
Seeds, and where an amax begins, change from call to call: kernels are not compiled for their divisors.

Legend: B samples, M tokens, M' tokens filled to whole groups, K or N features, R groups of a program, T tiles of 16 x 16 of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .hadamard import SIGNS
from .nvfp4 import GROUP, NVFP4, RULES
from .random_bits import seed_word
from .triton_fp4 import MEASURES, candidate, e2m1, error_term, finite, fused_largest, joined, nearest, nearest_at_random, random_24, signed

NEGATIVE = tl.constexpr(sum(1 << i for i, sign in enumerate(SIGNS) if sign < 0))  # bit i: sign i is negative
STEPS = 4  # groups of tokens that a program of `fused_turned_largest` reads


@triton.jit
def load_words(x, at, inside):
    """Four words of 32 bits at `x + 4 at` as a tuple of tensors."""
    place = at[:, None] * 4 + tl.arange(0, 4)[None, :]
    t = tl.load(x.to(tl.pointer_type(tl.int32), bitcast=True) + place, mask=inside[:, None], other=0)
    even, odd = tl.split(tl.reshape(t, (t.shape[0], 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def load_group(x, at, inside):
    """The 16 values of the groups `at`, float32."""
    WORDS: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8  # loads of 16 bytes
    v = ()
    for i in tl.static_range(WORDS):
        words = load_words(x, at * WORDS + i, inside)
        for j in tl.static_range(4):
            if WORDS == 4:
                v = v + (words[j].to(tl.float32, bitcast=True),)
            else:
                low, high = words[j].to(tl.int16), (words[j] >> 16).to(tl.int16)
                v = v + (low.to(x.dtype.element_ty, bitcast=True).to(tl.float32), high.to(x.dtype.element_ty, bitcast=True).to(tl.float32))
    return v


@triton.jit
def pair(low, high):
    """Two numbers that bfloat16 holds, in a word."""
    a, b = low.to(tl.bfloat16).to(tl.int16, bitcast=True), high.to(tl.bfloat16).to(tl.int16, bitcast=True)
    return (a.to(tl.int32) & 0xFFFF) | (b.to(tl.int32) << 16)


@triton.jit
def store_group(out, at, inside, v):
    """16 values that bfloat16 holds as the groups `at`."""
    for i in tl.static_range(2):
        a, b, c, d = pair(v[8 * i], v[8 * i + 1]), pair(v[8 * i + 2], v[8 * i + 3]), pair(v[8 * i + 4], v[8 * i + 5]), pair(v[8 * i + 6], v[8 * i + 7])
        four = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4))
        place = (at * 2 + i)[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(out.to(tl.pointer_type(tl.int32), bitcast=True) + place, four, mask=inside[:, None])


@triton.jit
def butterfly(v, H: tl.constexpr):
    """Sums and differences of values H apart."""
    out = ()
    for i in tl.static_range(16):
        if i & H:
            out = out + (v[i - H] - v[i],)
        else:
            out = out + (v[i] + v[i + H],)
    return out


@triton.jit
def turned(v, kind: tl.constexpr):
    """`hadamard.hadamard` of 16 float32 values, rounded to the type `kind`, as float32."""
    w = ()
    for i in tl.static_range(16):
        if (NEGATIVE >> i) & 1:
            w = w + (v[i] * -0.25,)
        else:
            w = w + (v[i] * 0.25,)
    w = butterfly(butterfly(butterfly(butterfly(w, 1), 2), 4), 8)
    out = ()
    for i in tl.static_range(16):
        out = out + (w[i].to(kind).to(tl.float32),)
    return out


@triton.jit
def tree(x, T: tl.constexpr):
    """[T, 16] -> [T, 1]: sums over the rows of tiles, in the order of `nvfp4._error`."""
    for step in tl.static_range(4):
        a, b = tl.split(tl.permute(tl.reshape(x, (T, 2, 8 >> step)), (0, 2, 1)))
        x = a + b
    return x


@triton.jit
def scaled_groups(v, amax, E: tl.constexpr, M: tl.constexpr, MEASURE: tl.constexpr, UP: tl.constexpr, TILES: tl.constexpr):
    """(whether all is finite, E4M3 bits, their value, factor on the data) of groups whose 16 values are the tuple `v`, float32.

    TILES: values are [TILES, 16], whose rows share one scale; the results are [TILES, 1].
    """
    PRODUCT: tl.constexpr = E * M
    scale = tl.where(amax * (3.4028234663852886e38 / PRODUCT) > 1.0, tl.div_rn(amax * 0.0 + PRODUCT, amax), 0.0)
    largest = tl.abs(v[0])
    for i in tl.static_range(1, 16):
        largest = tl.maximum(largest, tl.abs(v[i]), propagate_nan=tl.PropagateNan.ALL)
    fine = finite(largest)
    if TILES:
        fine = tl.min(fine.to(tl.int32), 1)[:, None] > 0
        largest = tl.max(largest, 1)[:, None]
    largest = tl.where(fine, largest, 0.0)
    bits, value, inverse = candidate(largest, scale, 1.0, E, UP)
    if MEASURE > 0:
        bits_4, value_4, inverse_4 = candidate(largest, scale, 1.5, E, UP)
        six, four = tl.zeros_like(v[0]), tl.zeros_like(v[0])
        for i in tl.static_range(16):
            six = joined(six, error_term(v[i], inverse, value, amax, PRODUCT, MEASURE), MEASURE)
            four = joined(four, error_term(v[i], inverse_4, value_4, amax, PRODUCT, MEASURE), MEASURE)
        if TILES:
            if MEASURE == 3:
                six, four = tl.max(six, 1)[:, None], tl.max(four, 1)[:, None]
            else:
                six, four = tree(six, TILES), tree(four, TILES)
        better = four < six
        bits, value, inverse = tl.where(better, bits_4, bits), tl.where(better, value_4, value), tl.where(better, inverse_4, inverse)
    return fine, bits, value, inverse


@triton.jit
def coded(v, amax, start, row, column, E: tl.constexpr, M: tl.constexpr, MEASURE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """code * scale (float32) of groups whose 16 values are the tuple `v`; NaN in groups that hold a value that is not finite.

    With STOCHASTIC, bits come from `start` and the places of values: `row`, and `column` on.
    """
    fine, _, value, inverse = scaled_groups(v, amax, E, M, MEASURE, STOCHASTIC, 0)
    value = tl.where(fine, value, float("nan"))
    out = ()
    for i in tl.static_range(16):
        if STOCHASTIC:
            kept = nearest_at_random(v[i] * inverse, random_24(start, row, column + i))
        else:
            kept = nearest(v[i] * inverse)
        out = out + (kept * value,)
    return out


@triton.jit(do_not_specialize=["start"], do_not_specialize_on_alignment=["amax"])
def fused_coded(
    x, amax, out, groups, row_groups, start,
    E: tl.constexpr, M: tl.constexpr, MEASURE: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """B tensors of `groups` groups each, one behind another; rows count through all of them."""
    b = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = b * groups + group
    v = load_group(x, at, group < groups)
    word = (tl.zeros_like(group) + start).to(tl.uint32, bitcast=True)
    v = coded(v, tl.load(amax + b), word, at // row_groups, at % row_groups * 16, E, M, MEASURE, STOCHASTIC)
    store_group(out, at, group < groups, v)


@triton.jit
def tokens_of(x, first, at, tokens, features, inside):
    """16 float32 tensors: features `at` of the tokens `first` on of the sample at `x`; 0 beyond its tokens."""
    v = ()
    for i in tl.static_range(16):
        v = v + (tl.load(x + (first + i).to(tl.int64) * features + at, mask=inside & (first + i < tokens), other=0.0).to(tl.float32),)
    return v


@triton.jit(do_not_specialize=["start"], do_not_specialize_on_alignment=["amax"])
def fused_turned_coded(
    x, amax, out, tokens, filled, features, blocks, start,
    E: tl.constexpr, M: tl.constexpr, MEASURE: tl.constexpr, STOCHASTIC: tl.constexpr, TURN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Groups of 16 tokens of samples [tokens, features], into [filled, features]. Bits are those of the transposed sample: a feature is a row."""
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) // blocks * 16
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < features
    v = tokens_of(x + b * tokens * features, first, at, tokens, features, inside)
    if TURN:
        v = turned(v, x.dtype.element_ty)
    word = (tl.zeros_like(at) + start).to(tl.uint32, bitcast=True)
    v = coded(v, tl.load(amax + b), word, b * features + at, first, E, M, MEASURE, STOCHASTIC)
    out += b * filled * features
    for i in tl.static_range(16):
        tl.store(out + (first + i).to(tl.int64) * features + at, v[i].to(out.dtype.element_ty), mask=inside)


@triton.jit
def fused_turned_largest(x, amax, tokens, features, blocks, samples, STEPS: tl.constexpr, TURN: tl.constexpr, BLOCK: tl.constexpr):
    """Largest finite |x| of each sample into `amax[0]`, and that of its turned groups of tokens into `amax[1]`."""
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    plain, after = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        v = tokens_of(x + b * tokens * features, (tl.program_id(0) // blocks * STEPS + step) * 16, at, tokens, features, at < features)
        for i in tl.static_range(16):
            plain = tl.maximum(plain, tl.where(finite(v[i]), tl.abs(v[i]), 0.0))
        if TURN:
            v = turned(v, x.dtype.element_ty)
            for i in tl.static_range(16):
                after = tl.maximum(after, tl.where(finite(v[i]), tl.abs(v[i]), 0.0))
    if not TURN:
        after = plain
    tl.atomic_max(amax + b, tl.max(plain, 0).to(tl.int32, bitcast=True))
    tl.atomic_max(amax + samples + b, tl.max(after, 0).to(tl.int32, bitcast=True))


@triton.jit
def fused_tiles(
    x, amax, codes, scales, tiles, columns,
    E: tl.constexpr, M: tl.constexpr, MEASURE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A matrix in tiles of 16 x 16, packed."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    row = (tile // (columns // 16) * 16)[:, None] + tl.arange(0, 16)[None, :]
    column = tl.zeros_like(row) + (tile % (columns // 16))[:, None]  # of groups
    inside = tl.zeros_like(row) + tile[:, None] < tiles
    group = row.to(tl.int64) * (columns // 16) + column
    v = ()
    for i in tl.static_range(16):
        v = v + (tl.load(x + group * 16 + i, mask=inside, other=0.0).to(tl.float32),)
    fine, bits, value, inverse = scaled_groups(v, tl.load(amax), E, M, MEASURE, False, TILES)
    words = codes.to(tl.pointer_type(tl.int32), bitcast=True) + group * 2
    for half in tl.static_range(2):
        word = tl.zeros_like(row)
        for i in tl.static_range(8):
            word = word | (tl.where(fine, e2m1(v[8 * half + i] * inverse), 0) << (4 * i))
        tl.store(words + half, word, mask=inside)
    tl.store(scales + group, tl.where(fine, bits, 0x7F).to(tl.uint8) + tl.zeros_like(row).to(tl.uint8), mask=inside)


@triton.jit
def alpha_of(amax_a, amax_b, PRODUCT_A: tl.constexpr, PRODUCT_B: tl.constexpr):
    """The product of both decode scales."""
    return tl.div_rn(tl.load(amax_a), PRODUCT_A) * tl.div_rn(tl.load(amax_b), PRODUCT_B)


@triton.jit(do_not_specialize_on_alignment=["amax_a", "amax_b"])
def fused_end(
    total, amax_a, amax_b, bias, out, rows, features, blocks,
    PRODUCT_A: tl.constexpr, PRODUCT_B: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total * alpha + bias of B samples of `rows` rows."""
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = (b * rows + row)[:, None] * features + column[None, :]
    inside = (row < rows)[:, None] & (column < features)[None, :]
    v = tl.load(total + at, mask=inside, other=0.0) * alpha_of(amax_a + b, amax_b, PRODUCT_A, PRODUCT_B)
    if BIAS:
        v += tl.load(bias + column, mask=column < features, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, v.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["samples", "shares"], do_not_specialize_on_alignment=["amax_a", "amax_b"])
def fused_sum(parts, amax_a, amax_b, out, samples, shares, count, PRODUCT_A: tl.constexpr, PRODUCT_B: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over samples of alpha times the sum of their `shares` products of `count` values, in their order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros([BLOCK], tl.float32)
    for b in range(samples):
        part = tl.zeros([BLOCK], tl.float32)
        for s in range(shares):
            part += tl.load(parts + tl.full([1], b * shares + s, tl.int64) * count + at, mask=inside, other=0.0)
        total += part * alpha_of(amax_a + b, amax_b + b, PRODUCT_A, PRODUCT_B)
    tl.store(out + at, total, mask=inside)


def _start(seed: int | None) -> int:
    return 0 if seed is None else signed(seed_word(seed))


def rows_largest_fused(x: torch.Tensor) -> torch.Tensor:
    """float32 [B]: the largest finite |x| of each sample of x [B, ...], contiguous."""
    bits, count = torch.zeros(len(x), dtype=torch.int32, device=x.device), x[0].numel()
    fused_largest[(triton.cdiv(count, 8192), len(x))](x, bits, count, BLOCK=8192, num_warps=8)
    return bits.view(torch.float32)


def _columns(features: int) -> dict[str, int]:
    """How many features a program of groups of tokens takes: one a thread."""
    block = max(32, min(128, triton.next_power_of_2(features)))
    return {"BLOCK": block, "num_warps": block // 32}


def both_largest_fused(x: torch.Tensor, turn: bool) -> torch.Tensor:
    """float32 [2, B] of x [B, M, K], contiguous: the largest finite |x| of each sample, and that of its groups of tokens, `turn`ed or not."""
    batch, tokens, features = x.shape
    bits, how = torch.zeros(2, batch, dtype=torch.int32, device=x.device), _columns(features)
    blocks = triton.cdiv(features, how["BLOCK"])
    grid = blocks * triton.cdiv(tokens, GROUP * STEPS), batch
    fused_turned_largest[grid](x, bits, tokens, features, blocks, batch, STEPS=STEPS, TURN=turn, enable_fp_fusion=False, **how)
    return bits.view(torch.float32)


def rows_fused(x: torch.Tensor, rule: str, amax: torch.Tensor, seed: int | None) -> torch.Tensor:
    """bfloat16 like x [B, M, K], contiguous, K a multiple of 16: `products()` of what `quantised_activation` makes."""
    batch, tokens, features = x.shape
    out, how = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device), RULES[rule]
    groups = tokens * features // GROUP
    fused_coded[(triton.cdiv(groups, 128), batch)](
        x, amax, out, groups, features // GROUP, _start(seed),
        E=how.code, M=how.scale, MEASURE=MEASURES[how.error], STOCHASTIC=seed is not None, BLOCK=128, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def tokens_fused(x: torch.Tensor, rule: str, amax: torch.Tensor, seed: int | None, turn: bool) -> torch.Tensor:
    """bfloat16 [B, M', K]: the same of x [B, M, K] along its tokens, `turn`ed before or not."""
    batch, tokens, features = x.shape
    filled, how, columns = triton.cdiv(tokens, GROUP) * GROUP, RULES[rule], _columns(features)
    out, blocks = torch.empty(batch, filled, features, dtype=torch.bfloat16, device=x.device), triton.cdiv(features, columns["BLOCK"])
    fused_turned_coded[(blocks * filled // GROUP, batch)](
        x, amax, out, tokens, filled, features, blocks, _start(seed),
        E=how.code, M=how.scale, MEASURE=MEASURES[how.error], STOCHASTIC=seed is not None, TURN=turn, enable_fp_fusion=False, **columns,
    )  # fmt: skip
    return out


def tiles_fused(w: torch.Tensor, rule: str) -> NVFP4:
    """`nvfp4.quantise(w, rule, tile=16, on_nonfinite="nan")` of w [N, K], both multiples of 16."""
    w = w.contiguous()
    rows, columns = w.shape
    amax, how, tiles = rows_largest_fused(w[None]), RULES[rule], w.numel() // GROUP**2
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=w.device)
    scales = torch.empty(rows, columns // GROUP, dtype=torch.uint8, device=w.device)
    fused_tiles[(triton.cdiv(tiles, 8),)](
        w, amax, codes, scales, tiles, columns, E=how.code, M=how.scale, MEASURE=MEASURES[how.error], TILES=8, num_warps=4, enable_fp_fusion=False
    )
    return NVFP4(codes, scales, amax.reshape(()), rule, GROUP, tuple(w.shape), w.dtype)


def end_fused(
    total: torch.Tensor, amax_a: torch.Tensor, amax_b: torch.Tensor, products: tuple[float, float], bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """total [B, M, N] * alpha + bias in `dtype`: alpha = (amax_a [B] / E M) (amax_b [] / E M), with the two E M as `products`."""
    batch, rows, features = total.shape
    out, block = torch.empty(total.shape, dtype=dtype, device=total.device), min(256, triton.next_power_of_2(features))
    height, blocks = 2048 // block, triton.cdiv(features, block)
    fused_end[(triton.cdiv(rows, height) * blocks, batch)](
        total, amax_a, amax_b, total if bias is None else bias, out, rows, features, blocks,
        PRODUCT_A=products[0], PRODUCT_B=products[1], BIAS=bias is not None, ROWS=height, BLOCK=block, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def sum_fused(parts: torch.Tensor, amax_a: torch.Tensor, amax_b: torch.Tensor, products: tuple[float, float]) -> torch.Tensor:
    """float32 [N, K]: the sum over B of parts [B S, N, K], S to a sample, times alpha = (amax_a [B] / E M) (amax_b [B] / E M)."""
    samples, (_, rows, columns) = len(amax_a), parts.shape
    out = torch.empty(rows, columns, dtype=torch.float32, device=parts.device)
    fused_sum[(triton.cdiv(out.numel(), 512),)](
        parts, amax_a, amax_b, out, samples, len(parts) // samples, out.numel(),
        PRODUCT_A=products[0], PRODUCT_B=products[1], BLOCK=512, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
