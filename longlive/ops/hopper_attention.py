"""Attention in FP8 on Hopper, in Gluon, where warps have roles: one fetches keys and values, two groups of four compute. (`attention.fp8` is the reference.)

A program takes 128 queries of one head, 64 a group, through all keys, 192 at a time, the last ones first, so that only the first step masks. The groups take
turns at the tensor cores: while one multiplies, the other exponentiates. A step multiplies the queries with its keys, and the weights of the step before
with that step's values.

Weights stay in registers, where a thread holds them as the second product reads them, given the order of keys that `triton_attention.key_order` has in values.

A row's weights are exp2(logit - base), base = highest logit - 6 as of when it last grew by more than 2.5: weights stay below 2^8.5, within e4m3, sums are faded
seldom, and the result is the same, since sums and products share the base.

Legend: B batch, N queries, M keys, H heads, d head features.
"""

from __future__ import annotations

import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

GROUP, TILES = 64, (128, 64)  # queries of a group; keys of a step: two tiles, each a power of two
QUERIES, WIDE, NARROW = gl.constexpr(GROUP), gl.constexpr(TILES[0]), gl.constexpr(TILES[1])
STAGES = gl.constexpr(2)  # steps in shared memory
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)


def _fading(values: int) -> tuple[str, str]:
    """Assembly, and its constraints, that multiplies a thread's `values` by their rows' factors, unless those of all the warp are one.

    A thread has two rows; of its values, two are of the one, the next two of the other.
    """
    product = "".join(f"mul.ftz.f32 ${i}, ${i}, ${2 * values + i}; " for i in range(values))
    grown = f"setp.ne.f32 a, ${2 * values}, 0f3F800000; setp.ne.or.f32 a, ${2 * values + 2}, 0f3F800000, a; vote.sync.any.pred b, a, 0xffffffff; "
    constraints = ",".join(["=f"] * values + [str(i) for i in range(values)] + ["f"] * values)
    return "{ .reg .pred a, b; " + grown + "@!b bra SAME; " + product + "SAME: }", constraints


FADE_128, FADE_128_REGISTERS = (gl.constexpr(text) for text in _fading(64))
FADE_64, FADE_64_REGISTERS = (gl.constexpr(text) for text in _fading(32))
TO_CODES = gl.constexpr(
    "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; mov.b32 $0, {a, b}; }",
)


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def fade(sums, factors):
    if sums.shape[1] == 128:
        return gl.inline_asm_elementwise(FADE_128, FADE_128_REGISTERS, [sums, factors[:, None]], dtype=gl.float32, is_pure=False, pack=64)
    else:
        return gl.inline_asm_elementwise(FADE_64, FADE_64_REGISTERS, [sums, factors[:, None]], dtype=gl.float32, is_pure=False, pack=32)


@gluon.jit
def packed(p):
    """e4m3 codes of p [QUERIES, keys], each 16 keys in the order of the left operand: int32 [QUERIES, keys / 4], as which they pass through loops whole."""
    even, odd = p.reshape([p.shape[0], p.shape[1] // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([p.shape[0], p.shape[1] // 4, 2, 2]).split()
    a, c = even.split()
    b, d = odd.split()
    return gl.inline_asm_elementwise(TO_CODES, "=r,r,r,r,r", [a, b, c, d], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def operand(codes, layout: gl.constexpr):
    """The left operand of a product that `packed` gave, at no cost."""
    even = gl.join(codes.to(gl.int8), (codes >> 16).to(gl.int8))
    odd = gl.join((codes >> 8).to(gl.int8), (codes >> 24).to(gl.int8))
    bytes = gl.join(even, odd).reshape([codes.shape[0], codes.shape[1] * 4])
    return gl.convert_layout(bytes.to(gl.float8e4nv, bitcast=True), layout, assert_trivial=True)


@gluon.jit
def masked(logits, first, M):
    key = first + gl.arange(0, logits.shape[1], gl.SliceLayout(0, logits.type.layout))
    return gl.where((key < M)[None, :], logits, float("-inf"))


@gluon.jit
def parts(x):
    """x [QUERIES, keys] as [QUERIES, keys / 8, 4, 2]: a thread has one of the four, and all that have it."""
    return x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])


@gluon.jit
def sums(p):
    return gl.sum(gl.sum(parts(p), 3), 1)


@gluon.jit
def bases(wide, narrow, highest, scale):
    """The highest logit that weights are based on, the factors of what was summed on the former, and the base: each [QUERIES]."""
    top = gl.max(gl.max(parts(wide), 3), 1)
    other = gl.max(gl.max(parts(narrow), 3), 1)
    top = gl.maximum(highest, gl.convert_layout(gl.max(gl.maximum(top, gl.convert_layout(other, top.type.layout)), 1), highest.type.layout))
    now = gl.where((top - highest) * scale > 2.5, top, highest)
    return now, exp2((highest - now) * scale), now * scale - 6.0


@gluon.jit
def weights(wide, narrow, base, scale):
    """exp2(logit - base) of both tiles, and their sums of a thread [QUERIES, 4]."""
    p = exp2(wide * scale - base[:, None])
    r = exp2(narrow * scale - gl.convert_layout(base, gl.SliceLayout(1, narrow.type.layout))[:, None])
    sum = sums(p)
    return p, r, sum + gl.convert_layout(sums(r), sum.type.layout)


@gluon.jit
def multiply(q, k_wide, k_narrow):
    """Logits [QUERIES, WIDE] and [QUERIES, NARROW], begun."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 32])
    thin: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NARROW, 32])
    wide = gl.zeros([QUERIES, WIDE], gl.float32, layout)
    narrow = gl.zeros([QUERIES, NARROW], gl.float32, thin)
    left = gl.convert_layout(q, gl.DotOperandLayout(0, layout, 4), assert_trivial=True)
    right = gl.convert_layout(q, gl.DotOperandLayout(0, thin, 4), assert_trivial=True)
    wide = warpgroup_mma(left, k_wide.permute([1, 0]), wide, use_acc=False, is_async=True)
    return wide, warpgroup_mma(right, k_narrow.permute([1, 0]), narrow, use_acc=False, is_async=True)


@gluon.jit
def read(codes, thin_codes, v_wide, v_narrow, out):
    """`out` [QUERIES, d] with a step's values by their weights added, begun."""
    layout: gl.constexpr = gl.DotOperandLayout(0, out.type.layout, 4)
    out = warpgroup_mma(operand(codes, layout), v_wide.permute([1, 0]), out, is_async=True)
    return warpgroup_mma(operand(thin_codes, layout), v_narrow.permute([1, 0]), out, is_async=True)


@gluon.jit
def queries_of(q, row, N, head, H, d: gl.constexpr, layout: gl.constexpr):
    """e4m3 of the group's queries, saturating, NaN kept, as the left operand of products. `row` of the first; `q` points to the sample."""
    n = row + gl.arange(0, QUERIES, gl.SliceLayout(1, layout))
    place = (n.to(gl.int64) * H + head)[:, None] * d + gl.arange(0, d, gl.SliceLayout(0, layout))[None, :]
    x = gl.load(q + place, mask=(n < N)[:, None], other=0.0).to(gl.float32)
    return gl.where(x == x, gl.minimum(gl.maximum(x, -448.0), 448.0), x).to(gl.float8e4nv)


@gluon.jit
def fetch(k_wide, k_narrow, v_wide, v_narrow, pages, full, free, M, k_row, v_row, head, d: gl.constexpr):
    """Step i: the keys of block i from the end and the values of the block before; nothing where there is none, which reads as zero."""
    BLOCK: gl.constexpr = WIDE + NARROW
    blocks = (M + BLOCK - 1) // BLOCK
    for i in range(blocks + 1):
        slot = i % STAGES
        m = (blocks - 1 - i) * BLOCK
        mbarrier.wait(free.index(slot), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(slot), 2 * BLOCK * d)
        tma.async_copy_global_to_shared(k_wide, [k_row + m, head * d], full.index(slot), pages[0].index(slot))
        tma.async_copy_global_to_shared(k_narrow, [k_row + m + WIDE, head * d], full.index(slot), pages[1].index(slot))
        tma.async_copy_global_to_shared(v_wide, [v_row, m + BLOCK], full.index(slot), pages[2].index(slot))
        tma.async_copy_global_to_shared(v_narrow, [v_row, m + BLOCK + WIDE], full.index(slot), pages[3].index(slot))


@gluon.jit
def attend(q, out, pages, full, free, turn, row, N, M, head, H, scale, WHO: gl.constexpr, d: gl.constexpr):
    """A group's queries through all keys. `q` and `out` point to the sample."""
    BLOCK: gl.constexpr = WIDE + NARROW
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, d, 32])
    ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    k_wide, k_narrow, v_wide, v_narrow = pages
    blocks = (M + BLOCK - 1) // BLOCK
    queries = queries_of(q, row, N, head, H, d, gl.DotOperandLayout(0, LOGITS, 4))
    sum = gl.zeros([QUERIES, d], gl.float32, OUT)
    highest = gl.full([QUERIES], -1e30, gl.float32, gl.SliceLayout(1, LOGITS))
    mbarrier.wait(full.index(0), 0)
    wide, narrow = multiply(queries, k_wide.index(0), k_narrow.index(0))
    wide, narrow = warpgroup_mma_wait(0, deps=[wide, narrow])
    mbarrier.arrive(free.index(0), count=1)
    wide, narrow = masked(wide, (blocks - 1) * BLOCK, M), masked(narrow, (blocks - 1) * BLOCK + WIDE, M)
    highest, factors, base = bases(wide, narrow, highest, scale)
    p, r, weight = weights(wide, narrow, base, scale)
    codes, thin_codes = packed(p), packed(r)
    mbarrier.wait(full.index(1 % STAGES), (1 // STAGES) & 1)
    for i in range(1, blocks):
        slot = i % STAGES
        mbarrier.wait(turn.index(WHO), (i - 1) & 1)
        wide, narrow = multiply(queries, k_wide.index(slot), k_narrow.index(slot))
        sum = read(codes, thin_codes, v_wide.index(slot), v_narrow.index(slot), sum)
        mbarrier.arrive(turn.index(1 - WHO), count=1)
        wide, narrow = warpgroup_mma_wait(2, deps=[wide, narrow])
        highest, factors, base = bases(wide, narrow, highest, scale)
        mbarrier.wait(full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1)
        sum, base = warpgroup_mma_wait(0, deps=[sum, base])
        mbarrier.arrive(free.index(slot), count=1)
        p, r, added = weights(wide, narrow, base, scale)
        weight = weight * gl.convert_layout(factors, gl.SliceLayout(1, weight.type.layout))[:, None] + added
        codes, thin_codes = packed(p), packed(r)
        sum = fade(sum, gl.convert_layout(factors, ROWS))
    sum = read(codes, thin_codes, v_wide.index(blocks % STAGES), v_narrow.index(blocks % STAGES), sum)
    sum = warpgroup_mma_wait(0, deps=[sum])
    n = row + gl.arange(0, QUERIES, ROWS)
    place = (n.to(gl.int64) * H + head)[:, None] * d + gl.arange(0, d, gl.SliceLayout(0, OUT))[None, :]
    sum = sum * gl.convert_layout(1.0 / gl.sum(weight, 1), ROWS)[:, None]
    gl.store(out + place, sum.to(out.dtype.element_ty), mask=(n < N)[:, None])


@gluon.jit(do_not_specialize=["N", "M", "H", "k_rows"])
def fused_attention_fp8_hopper(q, k_wide, k_narrow, v_wide, v_narrow, out, N, M, H, k_rows, scale, d: gl.constexpr):
    head, b = gl.program_id(1), gl.program_id(2)
    row = gl.program_id(0) * (2 * QUERIES)
    sample = b.to(gl.int64) * N * H * d
    pages = (
        gl.allocate_shared_memory(gl.float8e4nv, [STAGES, WIDE, d], k_wide.layout),
        gl.allocate_shared_memory(gl.float8e4nv, [STAGES, NARROW, d], k_narrow.layout),
        gl.allocate_shared_memory(gl.float8e4nv, [STAGES, d, WIDE], v_wide.layout),
        gl.allocate_shared_memory(gl.float8e4nv, [STAGES, d, NARROW], v_narrow.layout),
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    mbarrier.arrive(turn.index(0), count=1)
    gl.warp_specialize(
        [
            (attend, (q + sample, out + sample, pages, full, free, turn, row, N, M, head, H, scale, 0, d)),
            (attend, (q + sample, out + sample, pages, full, free, turn, row + QUERIES, N, M, head, H, scale, 1, d)),
            (fetch, (k_wide, k_narrow, v_wide, v_narrow, pages, full, free, M, b * k_rows, (b * H + head) * d, head, d)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def attention(q_BNHd: torch.Tensor, k_BMHd: torch.Tensor, v_BHdM: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v [B, N, H, d] in the dtype of q, which is contiguous and rounded to e4m3 here.

    `k_BMHd`, `v_BHdM`: e4m3 as `triton_attention.codes` and `transposed_codes` give them, or the first M of longer ones.
    """
    B, N, H, d = q_BNHd.shape
    M = k_BMHd.shape[1]
    out = torch.empty_like(q_BNHd)
    k_rows = k_BMHd.stride(0) // (H * d)
    k = k_BMHd.as_strided(((B - 1) * k_rows + M, H * d), (H * d, 1))
    v = v_BHdM.as_strided((B * H * d, M), (v_BHdM.stride(2), 1))
    tiles = [(k, [TILES[0], d]), (k, [TILES[1], d]), (v, [d, TILES[0]]), (v, [d, TILES[1]])]
    described = [TensorDescriptor.from_tensor(t, block, gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv)) for t, block in tiles]
    fused_attention_fp8_hopper[(triton.cdiv(N, 2 * GROUP), H, B)](q_BNHd, *described, out, N, M, H, k_rows, d**-0.5 * math.log2(math.e), d=d, num_warps=4)
    return out
