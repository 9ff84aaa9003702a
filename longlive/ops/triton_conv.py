"""A 3x3x3 convolution over time in FP8, as one matrix product per tap and block of channels. (`conv_fp8` says when, and is the reference;
Hopper has its own, `hopper_conv`.)

Frames come with a border of zeros, so that every tap of every position is the same number of rows away: position p of the padded plane reads row
p + (dt * PH + dh) * PW + dw. Positions in the border are computed and dropped (1 % at the largest stage). Rows reach shared memory by the copy engine,
products are accumulated in float32, and scale, bias and the residual sum are applied before the only rounding.

Legend: B batch, T output frames, H W rows and columns, PH PW the same with the border, C channels in, O out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .triton_frames import fast, silu


@triton.jit(do_not_specialize=["T"])
def fused_norm_silu_fp8(
    x, bias, gamma, out, T, H, W, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    b, blocks = tl.program_id(1).to(tl.int64), tl.cdiv(W + 2, ROWS)
    line, w = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS) - 1
    t, h = line // (H + 2), line % (H + 2) - 1
    col = tl.arange(0, BLOCK_C)
    there = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    source = ((b * T + t) * H + h) * W + w
    v = tl.load(x + source[:, None] * C + col[None, :], mask=there[:, None] & (col < C)[None, :], other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + col, mask=col < C, other=0.0).to(tl.float32)[None, :]
    scale = tl.where(there, tl.rsqrt(tl.sum(v * v, 1) / C + eps), 0.0)
    v = silu(v * scale[:, None] * tl.load(gamma + col, mask=col < C, other=0.0).to(tl.float32)[None, :], FAST)
    v = tl.minimum(v, 448.0, propagate_nan=tl.PropagateNan.ALL)  # SiLU is never below -0.3
    place = ((b * (T + 2) + 2) * (H + 2) + line) * (W + 2) + w + 1
    tl.store(out + place[:, None] * C + col[None, :], v.to(out.dtype.element_ty), mask=(w <= W)[:, None] & (col < C)[None, :])


@triton.jit
def _finish(acc, row, inside, col, outputs, scales, bias, residual, out, RESIDUAL: tl.constexpr):
    """Scale, bias and residual sum of some columns of a tile, and the way to memory."""
    place = row[:, None] * outputs + col[None, :]
    y = acc * tl.load(scales + col)[None, :] + tl.load(bias + col).to(tl.float32)[None, :]
    if RESIDUAL:
        y += tl.load(residual + place, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _halves(acc, BM: tl.constexpr, BN: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["T"])
def fused_convolution_fp8(
    x_rows, w_rows, scales, bias, residual, out, T, PH, PW, outputs,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    blocks = outputs // BN
    n = tl.program_id(0) % blocks * BN
    m = tl.program_id(0) // blocks * BM
    b = tl.program_id(1)
    first = b * (T + 2) * PH * PW + m
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(27 * (C // BK)):
        tap, c = k // (C // BK), k % (C // BK) * BK
        shift = (tap // 9 * PH + tap // 3 % 3) * PW + tap % 3
        acc = tl.dot(x_rows.load([first + shift, c]), w_rows.load([tap * outputs + n, c]).T, acc)
    p = m + tl.arange(0, BM)
    w, line = p % PW, p // PW
    h, t = line % PH, line // PH
    inside = (t < T) & (h < PH - 2) & (w < PW - 2)
    row = ((b * T + t).to(tl.int64) * (PH - 2) + h) * (PW - 2) + w
    part: tl.constexpr = BN // 4
    col = n + tl.arange(0, part)
    left, right = _halves(acc, BM, BN)
    one, two = _halves(left, BM, BN // 2)
    _finish(one, row, inside, col, outputs, scales, bias, residual, out, RESIDUAL)
    _finish(two, row, inside, col + part, outputs, scales, bias, residual, out, RESIDUAL)
    one, two = _halves(right, BM, BN // 2)
    _finish(one, row, inside, col + 2 * part, outputs, scales, bias, residual, out, RESIDUAL)
    _finish(two, row, inside, col + 3 * part, outputs, scales, bias, residual, out, RESIDUAL)


def norm_silu_fp8(x_BTHWC: torch.Tensor, bias: torch.Tensor | None, gamma: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """SiLU of the channel norm of x + bias in FP8, behind `past` [B, 2, PH, PW, C]: [B, 2 + T, PH, PW, C] with a border of zeros."""
    x = x_BTHWC.contiguous()
    B, T, H, W, C = x.shape
    out = torch.empty(B, 2 + T, H + 2, W + 2, C, dtype=torch.float8_e4m3fn, device=x.device)
    out[:, :2] = past
    block = triton.next_power_of_2(C)
    lines = max(1, 4096 // block)
    fused_norm_silu_fp8[(T * (H + 2) * triton.cdiv(W + 2, lines), B)](
        x, gamma if bias is None else bias, gamma, out, T, H, W, 1e-24 / C, C=C, BLOCK_C=block, ROWS=lines, BIAS=bias is not None, FAST=fast(x)
    )
    return out


def convolution(frames: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """[B, T, H, W, O] in bias's dtype from FP8 frames [B, 2 + T, PH, PW, C] and codes [27, O, C], plus the residual."""
    B, _, PH, PW, C = frames.shape
    T, outputs = frames.shape[1] - 2, codes.shape[1]
    bm, bn, bk = 128, next(size for size in (256, 128, 64) if outputs % size == 0), 128 if C % 128 == 0 else 64
    out = torch.empty(B, T, PH - 2, PW - 2, outputs, dtype=bias.dtype, device=frames.device)
    x_rows = TensorDescriptor.from_tensor(frames.flatten(0, 3), [bm, bk])
    w_rows = TensorDescriptor.from_tensor(codes.flatten(0, 1), [bn, bk])
    fused_convolution_fp8[(triton.cdiv(T * PH * PW, bm) * (outputs // bn), B)](
        x_rows, w_rows, scales, bias, out if residual is None else residual.contiguous(), out, T, PH, PW, outputs,
        C=C, BM=bm, BN=bn, BK=bk, RESIDUAL=residual is not None, num_warps=8, num_stages=4,
    )  # fmt: skip
    return out
