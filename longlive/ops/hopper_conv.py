"""The FP8 convolution of `triton_conv` on Hopper, in Gluon (`hopper_tiles`). `conv_fp8` is the reference.

Legend: B batch, T output frames, H W rows and columns, PH PW the same with the border, C channels in, O out.
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


@gluon.jit
def corner(tile, T, PH, PW, outputs, ROWS: gl.constexpr, BN: gl.constexpr):
    """(sample, first position, first channel out) of a tile. Tiles of the same positions are neighbours."""
    columns = outputs // BN
    lines = (T * PH * PW + ROWS - 1) // ROWS
    return tile // columns // lines, tile // columns % lines * ROWS, tile % columns * BN


@gluon.jit
def fetch(x_rows, w_rows, one, two, weights, full, free, tiles, T, PH, PW, outputs, C: gl.constexpr):
    """Every step of every tile of this program: a block of channels of one tap."""
    M: gl.constexpr = x_rows.block_shape[0]
    BK: gl.constexpr = x_rows.block_shape[1]
    BN: gl.constexpr = w_rows.block_shape[0]
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, p, n = corner(tile, T, PH, PW, outputs, 2 * M, BN)
        first = b * (T + 2) * PH * PW + p
        for tap in range(27):
            row = first + (tap // 9 * PH + tap // 3 % 3) * PW + tap % 3
            for c in range(0, C, BK):
                w_at = [tap * outputs + n, c]
                fetched(step, (2 * M + BN) * BK, x_rows, [row, c], [row + M, c], w_rows, w_at, one, two, weights, full, free)
                step += 1


@gluon.jit
def write(sums, row, inside, col, outputs, scales, bias, residual, out, RESIDUAL: gl.constexpr):
    """Scale, bias and residual sum of some columns of a tile, and the way to memory."""
    y = gl.convert_layout(sums, lines_layout(sums.shape[0], PART))
    place = row[:, None] * outputs + col[None, :]
    y = y * gl.load(scales + col)[None, :] + gl.load(bias + col).to(gl.float32)[None, :]
    if RESIDUAL:
        y += gl.load(residual + place, mask=inside[:, None], other=0.0).to(gl.float32)
    gl.store(out + place, y.to(out.dtype.element_ty), mask=inside[:, None])


@gluon.jit
def multiply(
    rows, weights, full, free, scales, bias, residual, out, tiles, T, PH, PW, outputs,
    WHO: gl.constexpr, C: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """A group's rows of every tile of this program."""
    M: gl.constexpr = rows.shape[1]
    BN: gl.constexpr = weights.shape[1]
    LINES: gl.constexpr = lines_layout(M, PART)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, p, n = corner(tile, T, PH, PW, outputs, 2 * M, BN)
        sums = gl.zeros([M, BN], gl.float32, sums_layout(BN, 8))
        sums, step = multiplied(sums, step, 27 * (C // rows.shape[2]), rows, weights, full, free)
        p += WHO * M + gl.arange(0, M, gl.SliceLayout(1, LINES))
        w, line = p % PW, p // PW
        h, t = line % PH, line // PH
        inside = (t < T) & (h < PH - 2) & (w < PW - 2)
        row = ((b * T + t).to(gl.int64) * (PH - 2) + h) * (PW - 2) + w
        col = n + gl.arange(0, PART, gl.SliceLayout(0, LINES))
        if BN == 256:
            left, right = halves(sums)
            first, second = halves(left)
            third, fourth = halves(right)
            write(first, row, inside, col, outputs, scales, bias, residual, out, RESIDUAL)
            write(second, row, inside, col + PART, outputs, scales, bias, residual, out, RESIDUAL)
            write(third, row, inside, col + 2 * PART, outputs, scales, bias, residual, out, RESIDUAL)
            write(fourth, row, inside, col + 3 * PART, outputs, scales, bias, residual, out, RESIDUAL)
        elif BN == 128:
            first, second = halves(sums)
            write(first, row, inside, col, outputs, scales, bias, residual, out, RESIDUAL)
            write(second, row, inside, col + PART, outputs, scales, bias, residual, out, RESIDUAL)
        else:
            write(sums, row, inside, col, outputs, scales, bias, residual, out, RESIDUAL)


@gluon.jit(do_not_specialize=["tiles", "T"])
def fused_convolution_hopper(
    x_rows, w_rows, scales, bias, residual, out, tiles, T, PH, PW, outputs,
    C: gl.constexpr, STAGES: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    one = gl.allocate_shared_memory(x_rows.dtype, [STAGES] + x_rows.block_shape, x_rows.layout)
    two = gl.allocate_shared_memory(x_rows.dtype, [STAGES] + x_rows.block_shape, x_rows.layout)
    weights = gl.allocate_shared_memory(w_rows.dtype, [STAGES] + w_rows.block_shape, w_rows.layout)
    full, free = barriers(STAGES)
    gl.warp_specialize(
        [
            (multiply, (one, weights, full, free, scales, bias, residual, out, tiles, T, PH, PW, outputs, 0, C, RESIDUAL)),
            (multiply, (two, weights, full, free, scales, bias, residual, out, tiles, T, PH, PW, outputs, 1, C, RESIDUAL)),
            (fetch, (x_rows, w_rows, one, two, weights, full, free, tiles, T, PH, PW, outputs, C)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def convolution(frames: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """`triton_conv.convolution`: [B, T, H, W, O] in bias's dtype from FP8 frames [B, 2 + T, PH, PW, C] and codes [27, O, C], plus the residual."""
    B, _, PH, PW, C = frames.shape
    T, outputs = frames.shape[1] - 2, codes.shape[1]
    rows, columns, block, stages = tile_sizes(C, outputs, 1)
    out = torch.empty(B, T, PH - 2, PW - 2, outputs, dtype=bias.dtype, device=frames.device)
    tiles = B * triton.cdiv(T * PH * PW, 2 * rows) * (outputs // columns)
    x_rows, w_rows = tiled(frames.flatten(0, 3), [rows, block]), tiled(codes.flatten(0, 1), [columns, block])
    fused_convolution_hopper[(min(tiles, multiprocessors(frames.device)),)](
        x_rows, w_rows, scales, bias, out if residual is None else residual.contiguous(), out, tiles, T, PH, PW, outputs,
        C=C, STAGES=stages, RESIDUAL=residual is not None, num_warps=4,
    )  # fmt: skip
    return out
