"""Doubling of rows and columns with its 3x3 convolution, in one kernel: a matrix product over the four taps of one phase per tile of the small grid.

A tile is a run of positions, row after row. The copy engine gives zeros above and below the frame; beside it a tap reads the neighbouring row, so the taps that
look over that edge come first, and what they gave positions at the edge is put to zero. The tile goes straight to every second pixel of the large frame, with
scale, bias and the stage's doubled input added before the only rounding. Operands are bfloat16 or float16, or e4m3 codes with scales. (`conv_doubling` says
when; Hopper has its own, `hopper_doubling`.)

Legend: N = B * T frames, H W rows and columns of the small grid, C channels in, O or OUT channels out, phase = 2 j + k for row 2h + j and column 2w + k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .triton_conv import _halves
from .triton_rows import saturated

VALUES = 4096  # of a program that reads and writes only


@triton.jit
def _place(
    acc, f, phase, row, place, chosen, inside, first, x_scales, w_scales, bias, beside, out,
    OUT: tl.constexpr, PART: tl.constexpr, STEP: tl.constexpr, SCALED: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """Scales, bias and shortcut of the columns from `first` of a tile, and the way to memory. The shortcut takes one channel of every STEP, `chosen`."""
    col = first + tl.arange(0, PART)
    if SCALED:
        acc *= tl.load(x_scales + f) * tl.load(w_scales + phase * OUT + col)[None, :]
    acc += tl.load(bias + col).to(tl.float32)[None, :]
    if BESIDE:
        channel = STEP * first + tl.arange(0, STEP * PART)
        v = tl.load(beside + place[:, None] * (STEP * OUT) + channel[None, :], mask=inside[:, None], other=0.0)
        if STEP == 2:
            even, odd = tl.split(tl.reshape(v, (v.shape[0], PART, 2)))
            v = tl.where(chosen == 0, even, odd)
        acc += v.to(tl.float32)
    tl.store(out + row[:, None] * OUT + col[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["frames", "frames_beside", "lost"])
def fused_doubling_convolution(
    x_tiles, w_rows, x_scales, w_scales, bias, beside, out, frames, frames_beside, lost, H, W,
    C: tl.constexpr, OUT: tl.constexpr, TIME: tl.constexpr, STEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(1)
    blocks: tl.constexpr = OUT // BN
    n, phase, m = tl.program_id(0) % blocks * BN, tl.program_id(0) // blocks % 4, tl.program_id(0) // (4 * blocks) * BM
    j, k = phase // 2, phase % 2
    p = m + tl.arange(0, BM)
    h, w = p // W, p % W
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for s in range(2 * (C // BK)):
        i, c = s // (C // BK), s % (C // BK) * BK
        x = x_tiles.load([f, m + (i + j - 1) * W + 2 * k - 1, c]).reshape(BM, BK)
        acc = tl.dot(x, w_rows.load([(8 * i + 4 * k + phase) * OUT + n, c]).T, acc)
    acc = tl.where((w == k * (W - 1))[:, None], 0.0, acc)
    for s in range(2 * (C // BK)):
        i, c = s // (C // BK), s % (C // BK) * BK
        x = x_tiles.load([f, m + (i + j - 1) * W, c]).reshape(BM, BK)
        acc = tl.dot(x, w_rows.load([(8 * i + 4 * (1 - k) + phase) * OUT + n, c]).T, acc)
    inside = h < H
    row = (f.to(tl.int64) * (2 * H) + 2 * h + j) * (2 * W) + 2 * w + k
    t = f % frames + lost
    place = ((f // frames * frames_beside + t // TIME).to(tl.int64) * H + h) * W + w
    chosen = (4 * (t % TIME) + phase) * STEP // (4 * TIME)
    part: tl.constexpr = BN // 4
    left, right = _halves(acc, BM, BN)
    one, two = _halves(left, BM, BN // 2)
    _place(one, f, phase, row, place, chosen, inside, n, x_scales, w_scales, bias, beside, out, OUT, part, STEP, SCALED, BESIDE)
    _place(two, f, phase, row, place, chosen, inside, n + part, x_scales, w_scales, bias, beside, out, OUT, part, STEP, SCALED, BESIDE)
    one, two = _halves(right, BM, BN // 2)
    _place(one, f, phase, row, place, chosen, inside, n + 2 * part, x_scales, w_scales, bias, beside, out, OUT, part, STEP, SCALED, BESIDE)
    _place(two, f, phase, row, place, chosen, inside, n + 3 * part, x_scales, w_scales, bias, beside, out, OUT, part, STEP, SCALED, BESIDE)


@triton.jit
def fused_frame_sizes(x, sizes, values, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    frame = tl.program_id(1)
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.static_range(ROUNDS):
        at = (tl.program_id(0) * ROUNDS + i) * BLOCK + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(x + frame.to(tl.int64) * values + at, mask=at < values, other=0.0).to(tl.float32)))
    tl.atomic_max(sizes + frame, tl.max(largest, 0))


@triton.jit
def fused_frames_fp8(x, sizes, codes, scales, values, BLOCK: tl.constexpr):
    frame = tl.program_id(1)
    size = tl.load(sizes + frame)
    scale = tl.where(size == 0.0, 1.0, tl.maximum(tl.div_rn(size, 448.0), 1.1754943508222875e-38))
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = frame.to(tl.int64) * values + at
    v = tl.load(x + place, mask=at < values, other=0.0).to(tl.float32)
    tl.store(codes + place, saturated(v * tl.div_rn(1.0, scale)).to(codes.dtype.element_ty), mask=at < values)
    tl.store(scales + frame, scale, mask=tl.program_id(0) == 0)


def quantise_frames(x_NHWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 codes [N, H, W, C], scales float32 [N])"""
    x = x_NHWC.contiguous()
    N, values = len(x), x[0].numel()
    sizes, scales = torch.zeros(N, dtype=torch.float32, device=x.device), torch.empty(N, dtype=torch.float32, device=x.device)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    fused_frame_sizes[(triton.cdiv(values, 8 * VALUES), N)](x, sizes, values, ROUNDS=8, BLOCK=VALUES)
    fused_frames_fp8[(triton.cdiv(values, VALUES), N)](x, sizes, codes, scales, values, BLOCK=VALUES)
    return codes, scales


def places(x_NHWC: torch.Tensor, outputs: int, dtype: torch.dtype, beside: tuple[torch.Tensor, int, int, int] | None) -> tuple[torch.Tensor, tuple]:
    """Where the result goes, and what is added to it: `beside`, or the result's own place where nothing is."""
    N, H, W, _ = x_NHWC.shape
    out = torch.empty(N, 2 * H, 2 * W, outputs, dtype=dtype, device=x_NHWC.device)
    if beside is None:
        return out, (out, N, 1, 0)
    return out, (beside[0].contiguous(), *beside[1:])


def doubled(
    x_NHWC: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor,
    beside: tuple[torch.Tensor, int, int, int] | None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """[N, 2H, 2W, O] in bias's dtype from x and `conv_doubling.tap_rows` [16 O, C], plus bias, plus `beside` as in `triton_frames.interleave`.

    `scales`: of the frames [N] and of the rows of one tap [4 O], where x and rows are codes.
    """
    x, outputs = x_NHWC.contiguous(), len(rows) // 16
    N, H, W, C = x.shape
    out, (other, frames, time, lost) = places(x, outputs, bias.dtype, beside)
    bm, bn, bk = 128, 128 if outputs % 128 == 0 else 64, 128 // x.element_size()
    bk = bk if C % bk == 0 else 64
    x_scales, w_scales = (bias, bias) if scales is None else scales
    fused_doubling_convolution[(triton.cdiv(H * W, bm) * (4 * outputs // bn), N)](
        TensorDescriptor.from_tensor(x.flatten(1, 2), [1, bm, bk]), TensorDescriptor.from_tensor(rows, [bn, bk]), x_scales, w_scales, bias, other, out,
        frames, other.shape[1], lost, H, W, C=C, OUT=outputs, TIME=time, STEP=other.shape[-1] // outputs, BM=bm, BN=bn, BK=bk,
        SCALED=scales is not None, BESIDE=beside is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
