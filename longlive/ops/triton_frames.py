"""Pointwise work between the VAE's convolutions, one pass each over channels-last frames. (`frames` says when, and is the reference.)

Convolutions come without their bias, which costs nothing here and a pass of its own there. Arithmetic is float32, rounded once. Offsets are 64-bit: a stage of
a 704x1280 film has more than 2^31 values.

Legend: B batch, T frames, P past frames, H W rows and columns, C channels innermost, time: 2 where a stage doubles the frames, else 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

VALUES = 4096  # of a program


@triton.jit
def silu(v, FAST: tl.constexpr):
    """v / (1 + exp(-v)) in float32. FAST: by the two approximations of a GPU, each within 2 units of the last place, without the cases of tiny numbers."""
    if FAST:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 t, t; mul.f32 $0, $1, t; }",
            "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return v * tl.sigmoid(v)


@triton.jit
def fused_norm_silu(
    x, bias, gamma, out, rows, rows_of_past, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (col < C)[None, :]
    v = tl.load(x + (sample * rows + row)[:, None] * C + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + col, mask=col < C, other=0.0).to(tl.float32)[None, :]
    scale = tl.rsqrt(tl.sum(v * v, 1) / C + eps)
    v = silu(v * scale[:, None] * tl.load(gamma + col, mask=col < C, other=0.0).to(tl.float32)[None, :], FAST)
    place = sample * (rows + rows_of_past) + rows_of_past + row
    tl.store(out + place[:, None] * C + col[None, :], v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def fused_bias_add(y, x, bias, values, C: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < values
    v = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) + tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    v += tl.load(bias + at % C, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def fused_interleave(
    y, bias, beside, out, frames, frames_beside, lost, H, W,
    C: tl.constexpr, C_BESIDE: tl.constexpr, TIME: tl.constexpr, REPEATS: tl.constexpr, BLOCK_C: tl.constexpr, COLS: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)  # a row of the doubled frame
    n, row = line // (2 * H), line % (2 * H)
    h, j = row // 2, row % 2
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    w, k = column // 2, column % 2
    c = tl.arange(0, BLOCK_C)
    inside = (column < 2 * W)[:, None] & (c < C)[None, :]
    source = ((n * (H + 1) + h + j) * (W + 1) + w + k) * 4 + 2 * j + k
    v = tl.load(y + source[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    v += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if BESIDE:
        t = n % frames + lost
        i = t % TIME
        place = (((n // frames) * frames_beside + t // TIME) * H + h) * W + w
        if REPEATS == 4 * TIME:
            channel = c[None, :]
        else:
            channel = (c[None, :] * (4 * TIME) + (4 * i + 2 * j + k)[:, None]) // REPEATS
        v += tl.load(beside + place[:, None] * C_BESIDE + channel, mask=inside, other=0.0).to(tl.float32)
    to = (line * (2 * W) + column)[:, None] * C + c[None, :]
    tl.store(out + to, v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def fused_paired(y, bias, out, positions, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    frame = tl.program_id(1).to(tl.int64)  # of the result
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_C)
    half = frame % 2 * C
    inside = (row < positions)[:, None] & (col < C)[None, :]
    source = (frame // 2 * positions + row)[:, None] * (2 * C) + half + col[None, :]
    v = tl.load(y + source, mask=inside, other=0.0).to(tl.float32) + tl.load(bias + half + col, mask=col < C, other=0.0).to(tl.float32)[None, :]
    tl.store(out + (frame * positions + row)[:, None] * C + col[None, :], v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def fused_to_bytes(x, bias, out, H, W, PITCH: tl.constexpr, BLOCK: tl.constexpr):
    frame = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < H * W * 3
    colour, pixel = at % 3, at // 3
    column, row = pixel % W, pixel // W
    channel = colour * 4 + (column % 2) * 2 + row % 2
    place = ((row // 2) * (W // 2) + column // 2) * PITCH + channel
    v = tl.load(x + frame * (H // 2) * (W // 2) * PITCH + place, mask=inside, other=0.0).to(tl.float32)
    v += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    v = (v + 1.0) * 127.5
    whole = tl.floor(v)
    rest = v - whole  # halves go to the even neighbour, as torch rounds
    up = (rest > 0.5) | ((rest == 0.5) & (whole - 2.0 * tl.floor(whole * 0.5) == 1.0))
    v = tl.minimum(tl.maximum(tl.where(up, whole + 1.0, whole), 0.0), 255.0)
    tl.store(out + frame * H * W * 3 + at, v.to(tl.uint8), mask=inside)


def norm_silu(x_BTHWC: torch.Tensor, bias: torch.Tensor | None, gamma: torch.Tensor, past_BPHWC: torch.Tensor | None) -> torch.Tensor:
    """SiLU of the channel norm of x + bias, behind `past`: [B, P + T, H, W, C]."""
    x = x_BTHWC.contiguous()
    B, T, H, W, C = x.shape
    P = 0 if past_BPHWC is None else past_BPHWC.shape[1]
    out = x.new_empty(B, P + T, H, W, C)
    if P:
        out[:, :P] = past_BPHWC
    block = triton.next_power_of_2(C)
    lines = max(1, VALUES // block)
    rows = T * H * W
    fused_norm_silu[(triton.cdiv(rows, lines), B)](
        x, gamma if bias is None else bias, gamma, out, rows, P * H * W, 1e-24 / C, C=C, BLOCK_C=block, ROWS=lines, BIAS=bias is not None, FAST=fast(x)
    )
    return out


def fast(x: torch.Tensor) -> bool:
    """Whether `silu` may be FAST: on a GPU, not in the interpreter, for what is rounded to half precision or less."""
    return x.is_cuda and x.dtype != torch.float32


def bias_add(y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """y + x + bias, written into the contiguous y."""
    fused_bias_add[(triton.cdiv(y.numel(), VALUES),)](y, x.contiguous(), bias, y.numel(), C=y.shape[-1], BLOCK=VALUES)
    return y


def interleave(y_NHWJKC: torch.Tensor, bias: torch.Tensor, beside: tuple[torch.Tensor, int, int, int] | None) -> torch.Tensor:
    """Four phases -> one image [N, 2H, 2W, C], plus bias.

    `beside`: (x [B, T, H, W, C'], frames of each sample in y, time, leading frames to leave out) adds the stage's duplicated input.
    """
    y = y_NHWJKC.contiguous()
    N, H, W, _, _, C = y.shape
    H, W = H - 1, W - 1
    out = y.new_empty(N, 2 * H, 2 * W, C)
    x, frames, time, lost = (y, N, 1, 0) if beside is None else beside
    x = x.contiguous()
    block = triton.next_power_of_2(C)
    columns = min(max(1, VALUES // block), triton.next_power_of_2(2 * W))
    fused_interleave[(N * 2 * H, triton.cdiv(2 * W, columns))](
        y, bias, x, out, frames, x.shape[1], lost, H, W,
        C=C, C_BESIDE=x.shape[-1], TIME=time, REPEATS=C * 4 * time // x.shape[-1] if beside else 1, BLOCK_C=block, COLS=columns, BESIDE=beside is not None,
    )  # fmt: skip
    return out


def paired(y_BTHWC: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[B, T, H, W, 2C] plus bias [2C] -> [B, 2T, H, W, C]: the halves of the channels become frames."""
    y = y_BTHWC.contiguous()
    B, T, H, W, C = y.shape
    C //= 2
    out = y.new_empty(B, 2 * T, H, W, C)
    block = triton.next_power_of_2(C)
    rows = max(1, VALUES // block)
    fused_paired[(triton.cdiv(H * W, rows), 2 * B * T)](y, bias, out, H * W, C=C, BLOCK_C=block, ROWS=rows)
    return out


def to_bytes(x_BTHWC: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Patches [B, T, H/2, W/2, 12] plus bias, in [-1, 1] -> uint8 [B, T, H, W, 3]. A patch may be the first 12 of more channels."""
    B, T, H, W, _ = x_BTHWC.shape
    pitch = x_BTHWC.stride(3)
    x = x_BTHWC if x_BTHWC.stride() == (T * H * W * pitch, H * W * pitch, W * pitch, pitch, 1) else x_BTHWC.contiguous()
    out = torch.empty(B, T, 2 * H, 2 * W, 3, dtype=torch.uint8, device=x.device)
    block = VALUES // 4
    fused_to_bytes[(triton.cdiv(12 * H * W, block), B * T)](  # no fused multiply: what is rounded to whole numbers is the rounded product
        x, bias, out, 2 * H, 2 * W, PITCH=x.stride(3), BLOCK=block, enable_fp_fusion=False
    )
    return out
