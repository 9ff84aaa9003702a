"""The FP8 convolution of `triton_conv` on Hopper, in Gluon, where warps have roles: one fetches, groups of four multiply. (`conv_fp8` is the reference.)

A program stays for as many tiles as its multiprocessor has, one after the other, so that the first steps of a tile are fetched while the last one is written.
A step is a block of channels of one tap: each group multiplies its rows of the padded plane with the same weights.

Legend: B batch, T output frames, H W rows and columns, PH PW the same with the border, C channels in, O out.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

SHARED = 192 * 1024  # bytes for steps in flight
PART = gl.constexpr(64)  # columns that are written at a time
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)


@gluon.jit
def corner(tile, T, PH, PW, outputs, ROWS: gl.constexpr, BN: gl.constexpr):
    """(sample, first position, first channel out) of a tile. Tiles of the same positions are neighbours."""
    columns = outputs // BN
    lines = (T * PH * PW + ROWS - 1) // ROWS
    return tile // columns // lines, tile // columns % lines * ROWS, tile % columns * BN


@gluon.jit
def fetch(x_rows, w_rows, one, two, weights, full, free, tiles, T, PH, PW, outputs, C: gl.constexpr, STAGES: gl.constexpr):
    """Every step of every tile of this program, `STAGES` ahead of who multiplies."""
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
                slot = step % STAGES
                mbarrier.wait(free.index(slot), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(slot), (2 * M + BN) * BK)
                tma.async_copy_global_to_shared(x_rows, [row, c], full.index(slot), one.index(slot))
                tma.async_copy_global_to_shared(x_rows, [row + M, c], full.index(slot), two.index(slot))
                tma.async_copy_global_to_shared(w_rows, [tap * outputs + n, c], full.index(slot), weights.index(slot))
                step += 1


@gluon.jit
def write(sums, row, inside, col, outputs, scales, bias, residual, out, LINES: gl.constexpr, RESIDUAL: gl.constexpr):
    """Scale, bias and residual sum of some columns of a tile, and the way to memory."""
    y = gl.convert_layout(sums, LINES)
    place = row[:, None] * outputs + col[None, :]
    y = y * gl.load(scales + col)[None, :] + gl.load(bias + col).to(gl.float32)[None, :]
    if RESIDUAL:
        y += gl.load(residual + place, mask=inside[:, None], other=0.0).to(gl.float32)
    gl.store(out + place, y.to(out.dtype.element_ty), mask=inside[:, None])


@gluon.jit
def halves(sums):
    return sums.reshape([sums.shape[0], 2, sums.shape[1] // 2]).permute([0, 2, 1]).split()


@gluon.jit
def multiply(
    rows, weights, full, free, scales, bias, residual, out, tiles, T, PH, PW, outputs,
    WHO: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """A group's rows of every tile of this program."""
    M: gl.constexpr = rows.shape[1]
    BK: gl.constexpr = rows.shape[2]
    BN: gl.constexpr = weights.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    # A thread has eight columns side by side; rows are those of the products, so that only four threads exchange values.
    MORE: gl.constexpr = [[64, 0]] if M == 128 else []
    LINES: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32]] + MORE, [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [M, PART]
    )
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, p, n = corner(tile, T, PH, PW, outputs, 2 * M, BN)
        sums = gl.zeros([M, BN], gl.float32, SUMS)
        for k in range(27 * (C // BK)):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), (step // STAGES) & 1)
            sums = warpgroup_mma(rows.index(slot), weights.index(slot).permute([1, 0]), sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=[sums])
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        sums = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
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
            write(first, row, inside, col, outputs, scales, bias, residual, out, LINES, RESIDUAL)
            write(second, row, inside, col + PART, outputs, scales, bias, residual, out, LINES, RESIDUAL)
            write(third, row, inside, col + 2 * PART, outputs, scales, bias, residual, out, LINES, RESIDUAL)
            write(fourth, row, inside, col + 3 * PART, outputs, scales, bias, residual, out, LINES, RESIDUAL)
        elif BN == 128:
            first, second = halves(sums)
            write(first, row, inside, col, outputs, scales, bias, residual, out, LINES, RESIDUAL)
            write(second, row, inside, col + PART, outputs, scales, bias, residual, out, LINES, RESIDUAL)
        else:
            write(sums, row, inside, col, outputs, scales, bias, residual, out, LINES, RESIDUAL)


@gluon.jit(do_not_specialize=["tiles", "T"])
def fused_convolution_hopper(
    x_rows, w_rows, scales, bias, residual, out, tiles, T, PH, PW, outputs,
    C: gl.constexpr, STAGES: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    E: gl.constexpr = x_rows.dtype
    one = gl.allocate_shared_memory(E, [STAGES] + x_rows.block_shape, x_rows.layout)
    two = gl.allocate_shared_memory(E, [STAGES] + x_rows.block_shape, x_rows.layout)
    weights = gl.allocate_shared_memory(E, [STAGES] + w_rows.block_shape, w_rows.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    gl.warp_specialize(
        [
            (multiply, (one, weights, full, free, scales, bias, residual, out, tiles, T, PH, PW, outputs, 0, C, STAGES, RESIDUAL)),
            (multiply, (two, weights, full, free, scales, bias, residual, out, tiles, T, PH, PW, outputs, 1, C, STAGES, RESIDUAL)),
            (fetch, (x_rows, w_rows, one, two, weights, full, free, tiles, T, PH, PW, outputs, C, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def convolution(frames: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """`triton_conv.convolution`: [B, T, H, W, O] in bias's dtype from FP8 frames [B, 2 + T, PH, PW, C] and codes [27, O, C], plus the residual."""
    B, _, PH, PW, C = frames.shape
    T, outputs = frames.shape[1] - 2, codes.shape[1]
    columns = next(size for size in (256, 128, 64) if outputs % size == 0)
    rows, block = 64 if columns == 256 else 128, 128 if C % 128 == 0 else 64
    out = torch.empty(B, T, PH - 2, PW - 2, outputs, dtype=bias.dtype, device=frames.device)

    def tiled(x: torch.Tensor, size: list[int]) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x, size, gl.NVMMASharedLayout.get_default_for(size, gl.float8e4nv))

    tiles = B * triton.cdiv(T * PH * PW, 2 * rows) * (outputs // columns)
    x_rows, w_rows = tiled(frames.flatten(0, 3), [rows, block]), tiled(codes.flatten(0, 1), [columns, block])
    fused_convolution_hopper[(min(tiles, multiprocessors(frames.device)),)](
        x_rows, w_rows, scales, bias, out if residual is None else residual.contiguous(), out, tiles, T, PH, PW, outputs,
        C=C, STAGES=SHARED // ((2 * rows + columns) * block), RESIDUAL=residual is not None, num_warps=4,
    )  # fmt: skip
    return out
