"""What kernels in Gluon share whose programs stay for many tiles: two groups of four warps multiply, 64 or 128 rows each, and one warp fetches for both.

A step is 128 bytes of every row of both operands (64 where the channels of e4m3 are no multiple of 128). It is fetched as soon as both groups are done with
the step that was there, across tiles too, so that the first steps of a tile arrive while the last one is written. Columns of a finished tile are written 64 at
a time.
"""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

SHARED, STEP_BYTES = 192 * 1024, 128  # of all steps in flight, of a row in a step
PART = gl.constexpr(64)  # columns that are written at a time
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)


@gluon.constexpr_function
def sums_layout(columns, bits):
    """Of a group's sums [rows, columns], products of operands of so many bits."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 256 // bits])


@gluon.constexpr_function
def lines_layout(rows, columns):
    """Of what a group writes, [rows, columns], columns 64 or 128: a thread has 8 (16) columns side by side, in the rows of the thread's sums."""
    beside = [[0, n] for n in (1, 2, 4, 8)[: 3 if columns == 64 else 4]]
    width = 2 ** len(beside)
    return gl.DistributedLinearLayout(
        beside + [[8, 0], [0, 4 * width]] + ([[64, 0]] if rows == 128 else []),
        [[0, width], [0, 2 * width], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [rows, columns],
    )


@gluon.jit
def halves(sums):
    """The left and the right columns, at no cost."""
    return sums.reshape([sums.shape[0], 2, sums.shape[1] // 2]).permute([0, 2, 1]).split()


@gluon.jit
def barriers(STAGES: gl.constexpr):
    """(full, free) of each step in shared memory."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    return full, free


@gluon.jit
def fetched(step, bytes: gl.constexpr, x, one_at, two_at, w, w_at, one, two, weights, full, free):
    """Begins step number `step`, of so many bytes, as soon as its place is free: both groups' rows of x and the rows of w, from these coordinates."""
    slot = step % weights.shape[0]
    mbarrier.wait(free.index(slot), ((step // weights.shape[0]) & 1) ^ 1)
    mbarrier.expect(full.index(slot), bytes)
    tma.async_copy_global_to_shared(x, one_at, full.index(slot), one.index(slot))
    tma.async_copy_global_to_shared(x, two_at, full.index(slot), two.index(slot))
    tma.async_copy_global_to_shared(w, w_at, full.index(slot), weights.index(slot))


@gluon.jit
def multiplied(sums, step, steps, rows, weights, full, free):
    """`sums` with the products of the next `steps` steps added, `rows` [stages, (1,) M, K] and `weights` [stages, N, K], and the number of the step behind."""
    STAGES: gl.constexpr = weights.shape[0]
    M: gl.constexpr = sums.shape[0]
    for i in range(steps):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        sums = warpgroup_mma(rows.index(slot).reshape([M, weights.shape[2]]), weights.index(slot).permute([1, 0]), sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=[sums])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=i > 0)
        step += 1
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
    return sums, step


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile_sizes(inputs: int, outputs: int, item: int) -> tuple[int, int, int, int]:
    """(rows of a group, columns, values of a row in a step, steps in flight) for channels in and out, multiples of 64, and bytes of a value."""
    columns = next(size for size in (256, 128, 64) if outputs % size == 0)
    rows, values = 64 if columns == 256 else 128, STEP_BYTES // item
    values = values if inputs % values == 0 else 64
    return rows, columns, values, SHARED // ((2 * rows + columns) * values * item)


def tiled(x: torch.Tensor, size: list[int]) -> TensorDescriptor:
    """x, of e4m3, bfloat16 or float16, as the copy engine reads it in blocks of `size`."""
    kind = {torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    return TensorDescriptor.from_tensor(x, size, gl.NVMMASharedLayout.get_default_for(size, kind))
