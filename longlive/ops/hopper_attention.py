"""Attention on Hopper, in Gluon, where warps have roles: one fetches keys and values, two groups of four compute.

In FP8, or in bfloat16; `attention.fp8` and `attention.math` are the references. A program takes 128 queries of one head, 64 a group, through all keys, 192 a
step, the last ones first, so that only the first step masks. A step multiplies the queries with its keys, and the weights of the step before with the values of
that step, and exponentiates. The groups take turns to hand their products to the tensor cores, so that one exponentiates while the other multiplies.

Weights stay in registers, where a thread holds them as the second product reads them; in FP8 given the order of keys that `triton_attention.key_order` has.

A row's weights are exp2(logit - base), where base follows the highest logit so far, but only once that has grown by more than a bound, so that sums are
faded seldom. The result is the same, since sums and products share the base. In FP8 base is 6 below the highest, the bound 2.5, and weights stay below 2^8.5,
within e4m3.

Legend: B batch, N queries, M keys, H heads, d head features.
"""

from __future__ import annotations

import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

GROUP, TILES = 64, (128, 64)  # queries of a group; keys of a step: two tiles, each a power of two
QUERIES, WIDE, NARROW, BLOCK = (gl.constexpr(n) for n in (GROUP, *TILES, sum(TILES)))
STAGES = gl.constexpr(2)  # steps in shared memory
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)


def _fading(values: int) -> tuple[gl.constexpr, gl.constexpr]:
    """Assembly, and its constraints, that multiplies a thread's `values` by their rows' factors, unless those of all the warp are one.

    A thread has two rows; of its values, two are of the one, the next two of the other.
    """
    product = "".join(f"mul.ftz.f32 ${i}, ${i}, ${2 * values + i}; " for i in range(values))
    grown = f"setp.ne.f32 a, ${2 * values}, 0f3F800000; setp.ne.or.f32 a, ${2 * values + 2}, 0f3F800000, a; vote.sync.any.pred b, a, 0xffffffff; "
    constraints = ",".join(["=f"] * values + [str(i) for i in range(values)] + ["f"] * values)
    return gl.constexpr("{ .reg .pred a, b; " + grown + "@!b bra SAME; " + product + "SAME: }"), gl.constexpr(constraints)


FADE_128, FADE_128_REGISTERS = _fading(64)
FADE_64, FADE_64_REGISTERS = _fading(32)
TO_E4M3 = gl.constexpr("{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; mov.b32 $0, {a, b}; }")
# A sum of weights is never -1. That a thread might end here keeps the assembler from moving the exponentials behind the wait that follows.
COMPUTED = gl.constexpr("{ .reg .pred a; setp.eq.f32 a, $1, 0fBF800000; @a exit; mov.f32 $0, $1; }")


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
def fours(x):
    """e4m3 of x [QUERIES, n, 2, 2], saturating, NaN kept, four in an int32: [QUERIES, n]. So they pass through loops whole."""
    even, odd = x.split()
    a, c = even.split()
    b, d = odd.split()
    return gl.inline_asm_elementwise(TO_E4M3, "=r,r,r,r,r", [a, b, c, d], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def packed(p, E: gl.constexpr):
    """Weights p [QUERIES, keys] in E, as many in an int32 as it holds; for e4m3 each 16 keys in the order of the left operand."""
    if E == gl.float8e4nv:
        p = p.reshape([p.shape[0], p.shape[1] // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4])
        return fours(p.reshape([p.shape[0], p.shape[1] * 4, 2, 2]))
    else:
        a, b = p.reshape([p.shape[0], p.shape[1] // 2, 2]).split()
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def operand(codes, E: gl.constexpr, layout: gl.constexpr):
    """The left operand of a product from what `packed` gave, at no cost."""
    if E == gl.float8e4nv:
        even = gl.join(codes.to(gl.int8), (codes >> 16).to(gl.int8))
        odd = gl.join((codes >> 8).to(gl.int8), (codes >> 24).to(gl.int8))
        bits = gl.join(even, odd).reshape([codes.shape[0], codes.shape[1] * 4])
    else:
        bits = gl.join(codes.to(gl.int16), (codes >> 16).to(gl.int16)).reshape([codes.shape[0], codes.shape[1] * 2])
    return gl.convert_layout(bits.to(E, bitcast=True), layout, assert_trivial=True)


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
def bases(wide, narrow, highest, scale, E: gl.constexpr):
    """The highest logit that weights are based on, the factors of what was summed on the former, and the base: each [QUERIES]."""
    GROWTH: gl.constexpr = 2.5 if E == gl.float8e4nv else 8.0
    ROOM: gl.constexpr = 6.0 if E == gl.float8e4nv else 0.0
    top = gl.max(gl.max(parts(wide), 3), 1)
    other = gl.max(gl.max(parts(narrow), 3), 1)
    top = gl.maximum(highest, gl.convert_layout(gl.max(gl.maximum(top, gl.convert_layout(other, top.type.layout)), 1), highest.type.layout))
    now = gl.where((top - highest) * scale > GROWTH, top, highest)
    return now, exp2((highest - now) * scale), now * scale - ROOM


@gluon.jit
def weights(wide, narrow, base, scale):
    """exp2(logit - base) of both tiles, and their sums of a thread [QUERIES, 4]."""
    p = exp2(wide * scale - base[:, None])
    r = exp2(narrow * scale - gl.convert_layout(base, gl.SliceLayout(1, narrow.type.layout))[:, None])
    sum = sums(p)
    return p, r, sum + gl.convert_layout(sums(r), sum.type.layout)


@gluon.jit
def product(q, keys, n: gl.constexpr, E: gl.constexpr):
    """Logits [QUERIES, n], begun. Queries are packed, or in shared memory."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 256 // E.primitive_bitwidth])
    logits = gl.zeros([QUERIES, n], gl.float32, layout)
    if E == gl.float8e4nv:
        q = operand(q, E, gl.DotOperandLayout(0, layout, 4))
    return warpgroup_mma(q, keys.reshape([n, keys.shape[2]]).permute([1, 0]), logits, use_acc=False, is_async=True)


@gluon.jit
def read(codes, values, sum, n: gl.constexpr, d: gl.constexpr, E: gl.constexpr):
    """`sum` [QUERIES, d] with n values by their weights added, begun."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, d, 256 // E.primitive_bitwidth])
    if E == gl.float8e4nv:
        values = values.permute([1, 0])
    else:
        values = values.reshape([n, values.shape[2]])
    return warpgroup_mma(operand(codes, E, gl.DotOperandLayout(0, layout, 32 // E.primitive_bitwidth)), values, sum, is_async=True)


@gluon.jit
def queries_of(q, page, row, N, H, head, d: gl.constexpr, E: gl.constexpr):
    """The group's queries from `row` of a sample on, as `product` takes them."""
    if E == gl.float8e4nv:
        AT: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 32]), 4)
    else:
        AT: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // d, d // 8], [4, 1], [1, 0])
    n = row + gl.arange(0, QUERIES, gl.SliceLayout(1, AT))
    place = (n.to(gl.int64) * H + head)[:, None] * d + gl.arange(0, d, gl.SliceLayout(0, AT))[None, :]
    x = gl.load(q + place, mask=(n < N)[:, None], other=0.0)
    if E == gl.float8e4nv:
        return fours(x.to(gl.float32).reshape([QUERIES, d // 4, 2, 2]))
    else:
        page.store(x)
        fence_async_shared()
        gl.thread_barrier()
        return page


@gluon.jit
def fetch(k_wide, k_narrow, v_wide, v_narrow, pages, full, free, M, H, head, b, d: gl.constexpr):
    """Step i: the keys of block i from the end and the values of the block before; where there is none, zeros."""
    E: gl.constexpr = k_wide.dtype
    blocks = (M + BLOCK - 1) // BLOCK
    for i in range(blocks + 1):
        slot = i % STAGES
        m = (blocks - 1 - i) * BLOCK
        mbarrier.wait(free.index(slot), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(slot), BLOCK * d * E.primitive_bitwidth // 4)
        tma.async_copy_global_to_shared(k_wide, [b, m, head * d], full.index(slot), pages[0].index(slot))
        tma.async_copy_global_to_shared(k_narrow, [b, m + WIDE, head * d], full.index(slot), pages[1].index(slot))
        m += BLOCK
        if E == gl.float8e4nv:
            tma.async_copy_global_to_shared(v_wide, [(b * H + head) * d, m], full.index(slot), pages[2].index(slot))
            tma.async_copy_global_to_shared(v_narrow, [(b * H + head) * d, m + WIDE], full.index(slot), pages[3].index(slot))
        else:
            tma.async_copy_global_to_shared(v_wide, [b, m, head * d], full.index(slot), pages[2].index(slot))
            tma.async_copy_global_to_shared(v_narrow, [b, m + WIDE, head * d], full.index(slot), pages[3].index(slot))


@gluon.jit
def attend(q, page, out, pages, full, free, turn, row, N, M, H, head, scale, WHO: gl.constexpr, d: gl.constexpr, E: gl.constexpr):
    """A group's queries, from `row` of a sample on, through all keys. `q` and `out` point to the sample."""
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, d, 256 // E.primitive_bitwidth])
    ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    k_wide, k_narrow, v_wide, v_narrow = pages
    blocks = (M + BLOCK - 1) // BLOCK
    queries = queries_of(q, page, row, N, H, head, d, E)
    sum = gl.zeros([QUERIES, d], gl.float32, OUT)
    mbarrier.wait(full.index(0), 0)
    wide, narrow = product(queries, k_wide.index(0), WIDE, E), product(queries, k_narrow.index(0), NARROW, E)
    wide, narrow = warpgroup_mma_wait(0, deps=[wide, narrow])
    mbarrier.arrive(free.index(0), count=1)
    wide, narrow = masked(wide, (blocks - 1) * BLOCK, M), masked(narrow, (blocks - 1) * BLOCK + WIDE, M)
    highest = gl.full([QUERIES], -1e30, gl.float32, gl.SliceLayout(1, wide.type.layout))
    highest, factors, base = bases(wide, narrow, highest, scale, E)
    p, r, weight = weights(wide, narrow, base, scale)
    codes, thin = packed(p, E), packed(r, E)
    mbarrier.wait(full.index(1 % STAGES), (1 // STAGES) & 1)
    for i in range(1, blocks):
        slot = i % STAGES
        mbarrier.wait(turn.index(WHO), (i - 1) & 1)
        wide, narrow = product(queries, k_wide.index(slot), WIDE, E), product(queries, k_narrow.index(slot), NARROW, E)
        sum = read(codes, v_wide.index(slot), sum, WIDE, d, E)
        sum = read(thin, v_narrow.index(slot), sum, NARROW, d, E)
        mbarrier.arrive(turn.index(1 - WHO), count=1)
        wide, narrow = warpgroup_mma_wait(2, deps=[wide, narrow])
        highest, factors, base = bases(wide, narrow, highest, scale, E)
        p, r, added = weights(wide, narrow, base, scale)
        weight = weight * gl.convert_layout(factors, gl.SliceLayout(1, weight.type.layout))[:, None] + added
        weight = gl.inline_asm_elementwise(COMPUTED, "=f,f", [weight], dtype=gl.float32, is_pure=False, pack=1)
        mbarrier.wait(full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1)
        sum, p, r = warpgroup_mma_wait(0, deps=[sum, p, r])
        mbarrier.arrive(free.index(slot), count=1)
        codes, thin = packed(p, E), packed(r, E)
        sum = fade(sum, gl.convert_layout(factors, ROWS))
    sum = read(codes, v_wide.index(blocks % STAGES), sum, WIDE, d, E)
    sum = read(thin, v_narrow.index(blocks % STAGES), sum, NARROW, d, E)
    sum = warpgroup_mma_wait(0, deps=[sum])
    n = row + gl.arange(0, QUERIES, ROWS)
    place = (n.to(gl.int64) * H + head)[:, None] * d + gl.arange(0, d, gl.SliceLayout(0, OUT))[None, :]
    sum = sum * gl.convert_layout(1.0 / gl.sum(weight, 1), ROWS)[:, None]
    gl.store(out + place, sum.to(out.dtype.element_ty), mask=(n < N)[:, None])


@gluon.jit(do_not_specialize=["N", "M", "H"])
def fused_attention_hopper(q, k_wide, k_narrow, v_wide, v_narrow, out, N, M, H, scale, d: gl.constexpr):
    E: gl.constexpr = k_wide.dtype
    head, b = gl.program_id(1), gl.program_id(2)
    row = gl.program_id(0) * (2 * QUERIES)
    sample = b.to(gl.int64) * N * H * d
    pages = (
        gl.allocate_shared_memory(E, [STAGES] + k_wide.block_shape, k_wide.layout),
        gl.allocate_shared_memory(E, [STAGES] + k_narrow.block_shape, k_narrow.layout),
        gl.allocate_shared_memory(E, [STAGES] + v_wide.block_shape, v_wide.layout),
        gl.allocate_shared_memory(E, [STAGES] + v_narrow.block_shape, v_narrow.layout),
    )
    page = gl.allocate_shared_memory(E, [2, QUERIES, d], gl.NVMMASharedLayout.get_default_for([QUERIES, d], E))
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
            (attend, (q + sample, page.index(0), out + sample, pages, full, free, turn, row, N, M, H, head, scale, 0, d, E)),
            (attend, (q + sample, page.index(1), out + sample, pages, full, free, turn, row + QUERIES, N, M, H, head, scale, 1, d, E)),
            (fetch, (k_wide, k_narrow, v_wide, v_narrow, pages, full, free, M, H, head, b, d)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def _launch(q_BNHd: torch.Tensor, tiles: list[tuple[torch.Tensor, list[int]]], M: int) -> torch.Tensor:
    B, N, H, d = q_BNHd.shape
    out = torch.empty_like(q_BNHd)
    kind = gl.bfloat16 if tiles[0][0].dtype == torch.bfloat16 else gl.float8e4nv
    described = [TensorDescriptor.from_tensor(t, block, gl.NVMMASharedLayout.get_default_for(block, kind)) for t, block in tiles]
    fused_attention_hopper[(triton.cdiv(N, 2 * GROUP), H, B)](q_BNHd, *described, out, N, M, H, d**-0.5 * math.log2(math.e), d=d, num_warps=4)
    return out


def coded_attention(q_BNHd: torch.Tensor, k_BMHd: torch.Tensor, v_BHdM: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v [B, N, H, d] in the dtype of q, which is contiguous and rounded to e4m3 here.

    `k_BMHd`, `v_BHdM`: e4m3 as `triton_attention.codes` and `transposed_codes` give them, or the first M of longer ones.
    """
    B, M, H, d = k_BMHd.shape
    k, v = k_BMHd.flatten(2), v_BHdM.as_strided((B * H * d, M), (v_BHdM.stride(2), 1))
    return _launch(q_BNHd, [(k, [1, TILES[0], d]), (k, [1, TILES[1], d]), (v, [d, TILES[0]]), (v, [d, TILES[1]])], M)


def attention(q_BNHd: torch.Tensor, k_BMHd: torch.Tensor, v_BMHd: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v [B, N, H, d], all bfloat16; q is contiguous, heads and features of k and v are."""
    d, k, v = q_BNHd.shape[-1], k_BMHd.flatten(2), v_BMHd.flatten(2)
    return _launch(q_BNHd, [(t, [1, keys, d]) for t in (k, v) for keys in TILES], k.shape[1])
