"""The doubling convolution of `triton_doubling` on Hopper, in Gluon (`hopper_tiles`). `conv_doubling` says when; its torch code is the reference.

Legend: N = B * T frames, H W rows and columns of the small grid, C channels in, OUT out, phase = 2 j + k for row 2h + j and column 2w + k.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_tiles import (
    CONSUMER_REGISTERS,
    PART,
    PRODUCER_REGISTERS,
    barriers,
    fetched,
    halves,
    lines_layout,
    multiplied,
    multiprocessors,
    sums_layout,
    tile_sizes,
    tiled,
)
from .triton_doubling import places


@gluon.jit
def corner(tile, H, W, ROWS: gl.constexpr, BN: gl.constexpr, OUT: gl.constexpr):
    """(frame, phase, first position, first channel out) of a tile. Tiles of the same positions are neighbours."""
    columns: gl.constexpr = OUT // BN
    lines = (H * W + ROWS - 1) // ROWS
    return tile // (4 * columns) // lines, tile // columns % 4, tile // (4 * columns) % lines * ROWS, tile % columns * BN


@gluon.jit
def fetch(x_tiles, w_rows, one, two, weights, full, free, tiles, H, W, C: gl.constexpr, OUT: gl.constexpr):
    """Every step of every tile of this program: a block of channels of one tap, those that look over the edge first."""
    BITS: gl.constexpr = x_tiles.dtype.primitive_bitwidth
    M: gl.constexpr = x_tiles.block_shape[1]
    BK: gl.constexpr = x_tiles.block_shape[2]
    BN: gl.constexpr = w_rows.block_shape[0]
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        f, phase, p, n = corner(tile, H, W, 2 * M, BN, OUT)
        j, k = phase // 2, phase % 2
        for tap in range(4):
            over, i = 1 - tap // 2, tap % 2
            side = 1 - k + over * (2 * k - 1)
            row = p + (i + j - 1) * W + over * (2 * k - 1)
            for c in range(0, C, BK):
                w_at = [(8 * i + 4 * side + phase) * OUT + n, c]
                fetched(step, (2 * M + BN) * BK * BITS // 8, x_tiles, [f, row, c], [f, row + M, c], w_rows, w_at, one, two, weights, full, free)
                step += 1


@gluon.jit
def write(
    sums, f, phase, row, place, chosen, inside, first, x_scales, w_scales, bias, beside, out,
    OUT: gl.constexpr, STEP: gl.constexpr, SCALED: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """Scales, bias and shortcut of the columns from `first` of a tile, and the way to memory. The shortcut takes one channel of every STEP, `chosen`."""
    M: gl.constexpr = sums.shape[0]
    LINES: gl.constexpr = lines_layout(M, PART)
    y = gl.convert_layout(sums, LINES)
    col = first + gl.arange(0, PART, gl.SliceLayout(0, LINES))
    if SCALED:
        y *= gl.load(x_scales + f) * gl.load(w_scales + phase * OUT + col)[None, :]
    y += gl.load(bias + col).to(gl.float32)[None, :]
    if BESIDE:
        WIDE: gl.constexpr = lines_layout(M, STEP * PART)
        channel = STEP * first + gl.arange(0, STEP * PART, gl.SliceLayout(0, WIDE))
        at = gl.convert_layout(place, gl.SliceLayout(1, WIDE))[:, None] * (STEP * OUT) + channel[None, :]
        v = gl.load(beside + at, mask=gl.convert_layout(inside, gl.SliceLayout(1, WIDE))[:, None], other=0.0)
        if STEP == 2:
            even, odd = v.reshape([M, PART, 2]).split()
            v = gl.convert_layout(gl.where(chosen == 0, even, odd), LINES, assert_trivial=True)
        y += v.to(gl.float32)
    gl.store(out + row[:, None] * OUT + col[None, :], y.to(out.dtype.element_ty), mask=inside[:, None])


@gluon.jit
def multiply(
    rows, weights, full, free, given,
    WHO: gl.constexpr, C: gl.constexpr, OUT: gl.constexpr, TIME: gl.constexpr, STEP: gl.constexpr, SCALED: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """A group's rows of every tile of this program."""
    x_scales, w_scales, bias, beside, out, tiles, frames, frames_beside, lost, H, W = given
    M: gl.constexpr = rows.shape[2]
    BN: gl.constexpr = weights.shape[1]
    BITS: gl.constexpr = rows.dtype.primitive_bitwidth
    SUMS: gl.constexpr = sums_layout(BN, BITS)
    LINES: gl.constexpr = lines_layout(M, PART)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        f, phase, p, n = corner(tile, H, W, 2 * M, BN, OUT)
        j, k = phase // 2, phase % 2
        sums = gl.zeros([M, BN], gl.float32, SUMS)
        sums, step = multiplied(sums, step, 2 * (C // rows.shape[3]), rows, weights, full, free)
        edge = (p + WHO * M + gl.arange(0, M, gl.SliceLayout(1, SUMS))) % W == k * (W - 1)
        sums = gl.where(edge[:, None], 0.0, sums)
        sums, step = multiplied(sums, step, 2 * (C // rows.shape[3]), rows, weights, full, free)
        p += WHO * M + gl.arange(0, M, gl.SliceLayout(1, LINES))
        h, w = p // W, p % W
        inside = h < H
        row = (f.to(gl.int64) * (2 * H) + 2 * h + j) * (2 * W) + 2 * w + k
        t = f % frames + lost
        place = ((f // frames * frames_beside + t // TIME).to(gl.int64) * H + h) * W + w
        chosen = (4 * (t % TIME) + phase) * STEP // (4 * TIME)
        if BN == 256:
            left, right = halves(sums)
            one, two = halves(left)
            three, four = halves(right)
            write(one, f, phase, row, place, chosen, inside, n, x_scales, w_scales, bias, beside, out, OUT, STEP, SCALED, BESIDE)
            write(two, f, phase, row, place, chosen, inside, n + PART, x_scales, w_scales, bias, beside, out, OUT, STEP, SCALED, BESIDE)
            write(three, f, phase, row, place, chosen, inside, n + 2 * PART, x_scales, w_scales, bias, beside, out, OUT, STEP, SCALED, BESIDE)
            write(four, f, phase, row, place, chosen, inside, n + 3 * PART, x_scales, w_scales, bias, beside, out, OUT, STEP, SCALED, BESIDE)
        elif BN == 128:
            one, two = halves(sums)
            write(one, f, phase, row, place, chosen, inside, n, x_scales, w_scales, bias, beside, out, OUT, STEP, SCALED, BESIDE)
            write(two, f, phase, row, place, chosen, inside, n + PART, x_scales, w_scales, bias, beside, out, OUT, STEP, SCALED, BESIDE)
        else:
            write(sums, f, phase, row, place, chosen, inside, n, x_scales, w_scales, bias, beside, out, OUT, STEP, SCALED, BESIDE)


@gluon.jit(do_not_specialize=["tiles", "frames", "frames_beside", "lost"])
def fused_doubling_convolution_hopper(
    x_tiles, w_rows, x_scales, w_scales, bias, beside, out, tiles, frames, frames_beside, lost, H, W,
    C: gl.constexpr, OUT: gl.constexpr, TIME: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    one = gl.allocate_shared_memory(x_tiles.dtype, [STAGES] + x_tiles.block_shape, x_tiles.layout)
    two = gl.allocate_shared_memory(x_tiles.dtype, [STAGES] + x_tiles.block_shape, x_tiles.layout)
    weights = gl.allocate_shared_memory(w_rows.dtype, [STAGES] + w_rows.block_shape, w_rows.layout)
    full, free = barriers(STAGES)
    given = (x_scales, w_scales, bias, beside, out, tiles, frames, frames_beside, lost, H, W)
    gl.warp_specialize(
        [
            (multiply, (one, weights, full, free, given, 0, C, OUT, TIME, STEP, SCALED, BESIDE)),
            (multiply, (two, weights, full, free, given, 1, C, OUT, TIME, STEP, SCALED, BESIDE)),
            (fetch, (x_tiles, w_rows, one, two, weights, full, free, tiles, H, W, C, OUT)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def doubled(
    x_NHWC: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor,
    beside: tuple[torch.Tensor, int, int, int] | None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """`triton_doubling.doubled`: [N, 2H, 2W, O] in bias's dtype."""
    x, outputs = x_NHWC.contiguous(), len(rows) // 16
    N, H, W, C = x.shape
    M, columns, block, stages = tile_sizes(C, outputs, x.element_size())
    out, (other, frames, time, lost) = places(x, outputs, bias.dtype, beside)
    x_scales, w_scales = (bias, bias) if scales is None else scales
    tiles = N * triton.cdiv(H * W, 2 * M) * 4 * (outputs // columns)
    fused_doubling_convolution_hopper[(min(tiles, multiprocessors(x.device)),)](
        tiled(x.flatten(1, 2), [1, M, block]), tiled(rows, [columns, block]), x_scales, w_scales, bias, other, out,
        tiles, frames, other.shape[1], lost, H, W, C=C, OUT=outputs, TIME=time, STEP=other.shape[-1] // outputs, STAGES=stages,
        SCALED=scales is not None, BESIDE=beside is not None, num_warps=4,
    )  # fmt: skip
    return out
