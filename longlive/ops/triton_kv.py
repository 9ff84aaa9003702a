"""Quantised pages, fused: a quantising write, and one pass that dequantises, adds the mean, rotates and rounds. (`kv_reading` is the reference.)

The numbers are those of `kv_formats`, operation by operation: divisions are correctly rounded and multiply-adds are not fused. In the read a program holds
some tokens of some heads of one slot; a slot whose page is at hand in full (the running chunk, a kept sink) is read from there.

Legend: B batch, P pages (slots), L tokens of a page, H heads, d head features, b blocks of 64 tokens; HB heads and T tokens of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .fp8 import LARGEST
from .kv_formats import INT8_TOKENS, QuantisedPage, page_scale, token_mean
from .nvfp4 import GROUP, RULES
from .triton_fp4 import MEASURES, e2m1_value, e4m3_value, finite, store_groups

FP8, INT8, NVFP4 = 0, 1, 2
KINDS = {"fp8": FP8, "int8": INT8, "nvfp4": NVFP4}
HEADS, TOKENS = 4, 8
ROUND = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds a small float32 to the nearest integer, ties to even


@triton.jit
def fused_page_largest(
    x, mean, amax, x_b, x_n, x_h, tokens, heads, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, FINITE: tl.constexpr
):
    """Largest |x - mean| of each head; what is not finite counts as infinity, or (FINITE) not at all."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    col = tl.arange(0, BLOCK_D)
    inside = (n < tokens)[:, None] & (col < D)[None, :]
    v = tl.load(x + b * x_b + n[:, None] * x_n + h * x_h + col[None, :], mask=inside, other=0.0).to(tl.float32)
    v = v - tl.load(mean + (b * heads + h) * D + col, mask=col < D, other=0.0)[None, :]
    size = tl.where(finite(v), tl.abs(v), 0.0 if FINITE else float("inf"))
    largest = tl.max(tl.max(tl.where(inside, size, 0.0), 1), 0)
    tl.atomic_max(amax + b * heads + h, largest.to(tl.int32, bitcast=True))


@triton.jit
def fused_page_write(
    x, mean, scale, codes, scales, slot_B, x_b, x_n, x_h, tokens, heads, pages,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, INTEGERS: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """fp8 with the head's `scale`, or (INTEGERS) int8 with a scale of its own for BLOCK tokens, which is stored."""
    tile, h, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tile * BLOCK + tl.arange(0, BLOCK)
    col = tl.arange(0, BLOCK_D)
    inside = (n < tokens)[:, None] & (col < D)[None, :]
    v = tl.load(x + b * x_b + n[:, None] * x_n + h * x_h + col[None, :], mask=inside, other=0.0).to(tl.float32)
    v = v - tl.load(mean + (b * heads + h) * D + col, mask=col < D, other=0.0)[None, :]
    v = tl.where(inside, v, 0.0)
    page = b * pages + tl.load(slot_B + b)
    at = (page * tokens + n[:, None]) * heads * D + h * D + col[None, :]
    if INTEGERS:
        size = tl.where(finite(v), tl.abs(v), float("inf"))
        largest = tl.max(tl.max(size, 1), 0)
        factor = tl.where(largest == 0.0, 1.0, tl.maximum(tl.div_rn(largest, 127.0), 1.1754943508222875e-38))
        whole = (tl.div_rn(v, factor) + ROUNDING) - ROUNDING
        whole = tl.minimum(tl.maximum(tl.where(finite(whole), whole, 0.0), -127.0), 127.0)
        tl.store(codes + at, whole.to(tl.int8), mask=inside)
        tl.store(scales + (page * tl.num_programs(0) + tile) * heads + h, factor)
    else:
        scaled = tl.div_rn(v, tl.load(scale + b * heads + h))
        narrow = tl.minimum(tl.maximum(scaled, -448.0), 448.0).to(tl.float8e4nv)
        tl.store(codes + at, narrow.to(tl.uint8, bitcast=True), mask=inside)


@triton.jit
def fused_page_groups(
    x, mean, amax, codes, scales, slot_B, x_b, x_n, x_h, tokens, heads, pages,
    D: tl.constexpr, E: tl.constexpr, M: tl.constexpr, MEASURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """nvfp4: groups of 16 features of one token and head, one amax a head."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    groups: tl.constexpr = D // 16
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n, g = index // groups, index % groups
    inside = n < tokens
    page = b * pages + tl.load(slot_B + b)
    at = ((page * tokens + n) * heads + h) * groups + g
    head = b * heads + h
    store_groups(
        x, b * x_b + n * x_n + h * x_h + g * 16, mean, head * D + g * 16, inside, tl.load(amax + head), codes, at * 8, scales, at, 0, n, n,
        E, M, MEASURE, True, False,
    )  # fmt: skip


@triton.jit
def halves(v, T: tl.constexpr, HB: tl.constexpr, PAIRS: tl.constexpr):
    """[T, HB, 2 PAIRS] -> values at even and at odd features, [T, HB, PAIRS]."""
    return tl.split(tl.reshape(v, (T, HB, PAIRS, 2)))


@triton.jit
def fused_read(
    codes, scales, amax, mean, cos, sin, out, x1, x2, x3, slot1, slot2, slot3, x_b1, x_n1, x_h1, x_b2, x_n2, x_h2, x_b3, x_n3, x_h3,
    out_b, out_p, tokens, heads, pages, filled, table_b, product,
    KIND: tl.constexpr, D: tl.constexpr, T: tl.constexpr, HB: tl.constexpr, GIVEN: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = D // 2
    slot, b = tl.program_id(2) % filled, (tl.program_id(2) // filled).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    h = tl.program_id(1) * HB + tl.arange(0, HB)
    col, pair = tl.arange(0, D), tl.arange(0, PAIRS)
    here = (n < tokens)[:, None] & (h < heads)[None, :]
    inside = here[:, :, None]
    which = 0
    if GIVEN >= 1:
        which = tl.where(tl.load(slot1 + b) == slot, 1, which)
    if GIVEN >= 2:
        which = tl.where(tl.load(slot2 + b) == slot, 2, which)
    if GIVEN >= 3:
        which = tl.where(tl.load(slot3 + b) == slot, 3, which)
    page = b * pages + slot
    token = page * tokens + n
    if which == 0:
        if KIND == 2:
            at = (token[:, None] * heads + h[None, :])[:, :, None]
            byte = tl.load(codes + at * PAIRS + pair[None, None, :], mask=inside, other=0).to(tl.int32)
            scale = e4m3_value(tl.load(scales + at * (D // 16) + (pair // 8)[None, None, :], mask=inside, other=0))
            g = tl.div_rn(tl.load(amax + page * heads + h, mask=h < heads, other=0.0), product)[None, :, None]
            even = e2m1_value(byte & 15) * scale * g
            odd = e2m1_value(byte >> 4) * scale * g
        else:
            at = (token[:, None] * heads + h[None, :])[:, :, None] * D + col[None, None, :]
            if KIND == 0:
                value = e4m3_value(tl.load(codes + at, mask=inside, other=0))
                factor = tl.load(scales + page * heads + h, mask=h < heads, other=0.0)[None, :, None]
            else:
                value = tl.load(codes + at, mask=inside, other=0).to(tl.float32)
                block = page * ((tokens + 63) // 64) + n // 64
                factor = tl.load(scales + block[:, None] * heads + h[None, :], mask=here, other=0.0)[:, :, None]
            even, odd = halves(value * factor, T, HB, PAIRS)
        row = (page * heads + h) * D
        middle = tl.load(mean + row[:, None] + col[None, :], mask=(h < heads)[:, None], other=0.0)
        low, high = tl.split(tl.reshape(middle, (HB, PAIRS, 2)))
        even, odd = even + low[None, :, :], odd + high[None, :, :]
    else:
        at_given = b * x_b1 + n[:, None] * x_n1 + h[None, :] * x_h1
        if GIVEN >= 2:
            at_given = tl.where(which == 2, b * x_b2 + n[:, None] * x_n2 + h[None, :] * x_h2, at_given)
        if GIVEN >= 3:
            at_given = tl.where(which == 3, b * x_b3 + n[:, None] * x_n3 + h[None, :] * x_h3, at_given)
        place = at_given[:, :, None] + col[None, None, :]
        value = tl.load(x1 + place, mask=inside & (which == 1), other=0.0).to(tl.float32)
        if GIVEN >= 2:
            value += tl.load(x2 + place, mask=inside & (which == 2), other=0.0).to(tl.float32)
        if GIVEN >= 3:
            value += tl.load(x3 + place, mask=inside & (which == 3), other=0.0).to(tl.float32)
        even, odd = halves(value, T, HB, PAIRS)
    if ROTATE:
        at_table = b * table_b + (slot * tokens + n)[:, None] * PAIRS + pair[None, :]
        c = tl.load(cos + at_table, mask=(n < tokens)[:, None], other=0.0)[:, None, :]
        s = tl.load(sin + at_table, mask=(n < tokens)[:, None], other=0.0)[:, None, :]
        turned, odd = even * c - odd * s, even * s + odd * c
        even = turned
    value = tl.reshape(tl.join(even, odd), (T, HB, D))
    at_out = b * out_b + slot * out_p + (n[:, None] * heads + h[None, :])[:, :, None] * D + col[None, None, :]
    tl.store(out + at_out, value.to(out.dtype.element_ty), mask=inside)


def write_page_fused(x_BLHd: torch.Tensor, store: QuantisedPage, slot_B: torch.Tensor) -> None:
    """Quantises x [B, L, H, d] into slot `slot_B[b]` of a store's parts [B, P, ...]."""
    x = x_BLHd if x_BLHd.stride(-1) == 1 else x_BLHd.contiguous()
    B, L, H, d = x.shape
    mean = token_mean(x)
    rows = torch.arange(B, device=x.device)
    store.mean[rows, slot_B] = mean
    P, strides, kind = store.codes.shape[1], x.stride()[:3], KINDS[store.format]
    tiles, padded = triton.cdiv(L, INT8_TOKENS), triton.next_power_of_2(d)
    amax = None
    if kind != INT8:
        bits = torch.zeros(B, H, dtype=torch.int32, device=x.device)
        fused_page_largest[(tiles, H, B)](x, mean, bits, *strides, L, H, D=d, BLOCK_D=padded, BLOCK=INT8_TOKENS, FINITE=kind == NVFP4)
        amax = bits.view(torch.float32)
    if kind == NVFP4:
        store.amax[rows, slot_B] = amax
        how = RULES[store.rule]
        fused_page_groups[(triton.cdiv(L * d // GROUP, 128), H, B)](
            x, mean, amax, store.codes, store.scales, slot_B, *strides, L, H, P,
            D=d, E=how.code, M=how.scale, MEASURE=MEASURES[how.error], BLOCK=128, enable_fp_fusion=False,
        )  # fmt: skip
        return
    scale = mean
    if kind == FP8:
        scale = page_scale(amax, LARGEST)
        store.scales[rows, slot_B] = scale
    fused_page_write[(tiles, H, B)](
        x, mean, scale, store.codes, store.scales, slot_B, *strides, L, H, P,
        D=d, BLOCK_D=padded, BLOCK=INT8_TOKENS, INTEGERS=kind == INT8, ROUNDING=ROUND, enable_fp_fusion=False,
    )  # fmt: skip


def read_pages_fused(store: QuantisedPage, filled: int, rope, out_BPLHd: torch.Tensor, given) -> None:
    """`kv_reading.read_pages` on a GPU, with at most three given pages. `out` has contiguous pages."""
    B, _, L, H, d = out_BPLHd.shape
    pages = [(slot, x if x.stride(-1) == 1 else x.contiguous()) for slot, x in given]
    fill = [(pages[0] if pages else (store.codes, out_BPLHd[:, 0]))] * (3 - len(pages))
    slots, xs = zip(*pages, *fill)
    cos, sin = (t.contiguous() for t in rope) if rope is not None else (store.mean, store.mean)
    kind = KINDS[store.format]
    product = RULES[store.rule].code * RULES[store.rule].scale if kind == NVFP4 else 1.0
    fused_read[(triton.cdiv(L, TOKENS), triton.cdiv(H, HEADS), B * filled)](
        store.codes, store.scales, store.mean if store.amax is None else store.amax, store.mean, cos, sin, out_BPLHd,
        *xs, *slots, *(stride for x in xs for stride in x.stride()[:3]), *out_BPLHd.stride()[:2], L, H, store.codes.shape[1], filled,
        filled * L * (d // 2) if rope is not None and cos.shape[0] > 1 else 0, product,
        KIND=kind, D=d, T=TOKENS, HB=HEADS, GIVEN=len(pages), ROTATE=rope is not None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip

