"""Work on channels-last frames around the VAE's convolutions: channel norm, residual sum, doubling of rows and columns, bytes.

Each is plain torch, differentiable, and one fused pass on a GPU where no gradient is wanted. There a convolution leaves its bias out (`adds_bias`), and the
operation after it adds it.

Legend: B batch, T frames, P past frames, N = B * T, H W rows and columns, C channels innermost.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.pixels import to_uint8
from .inference import fuses

PATCH = 2
PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))


def adds_bias(x: Tensor, weight: Tensor) -> bool:
    """Whether the operations here add a bias for nothing, so that the convolution of `x` with `weight` should not."""
    return fuses(x, weight)


def norm_silu(x_BTHWC: Tensor, gamma: Tensor, past_BPHWC: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """SiLU(y / ||y|| * sqrt(C) * gamma), y = x + bias, behind `past` in time: [B, P + T, H, W, C]. Statistics in float32 (spec inference §5.2)."""
    if fuses(x_BTHWC, gamma, past_BPHWC, bias):
        from . import triton_frames

        return triton_frames.norm_silu(x_BTHWC, bias, gamma.flatten(), past_BPHWC)
    with torch.autocast(x_BTHWC.device.type, enabled=False):
        normed = rms(x_BTHWC if bias is None else x_BTHWC + bias, gamma)
        if past_BPHWC is None:
            return F.silu(normed)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.cat([past_BPHWC, F.silu(normed)], 1)
        B, T, H, W, C = x_BTHWC.shape
        out = x_BTHWC.new_empty(B, past_BPHWC.shape[1] + T, H, W, C)
        out[:, :-T] = past_BPHWC
        torch.ops.aten.silu.out(normed, out=out[:, -T:])
        return out


def rms(x: Tensor, gamma: Tensor) -> Tensor:
    """x / max(||x||, ~1e-12) * sqrt(C) * gamma over the last dimension."""
    channels = x.shape[-1]
    if plain_cpu(x) and x.dtype == torch.float32:  # fewer passes over memory than the composite rms_norm
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12)
        return (x * length.reciprocal_().mul_(channels**0.5)).mul_(gamma.flatten())
    return F.rms_norm(x, (channels,), gamma.flatten().to(x.dtype), 1e-24 / channels)


def plain_cpu(x: Tensor) -> bool:
    """Eager inference on a CPU, where in-place and library calls without a gradient are allowed."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def residual_add(y: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """y + x, or y + bias + x. With a bias y is fresh and may be written to."""
    if bias is None:
        return y + x
    if y.is_contiguous() and fuses(y, x, bias):
        from . import triton_frames

        return triton_frames.bias_add(y, x, bias)
    return y + bias + x


class Interleave(torch.autograd.Function):
    """Four phases side by side -> one image: out[2h + j, 2w + k] = y[h + j, w + k, j, k], y[N, h, w, j, k, C] with one row and column more than the source."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        N, H, W, _, _, C = y.shape
        out = y.new_empty(N, H - 1, 2, W - 1, 2, C)
        for j, k in PHASES:
            out[:, :, j, :, k] = y[:, j : H - 1 + j, k : W - 1 + k, j, k]
        return out.flatten(3, 4).flatten(1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        N, H, W, C = grad.shape
        H, W = H // 2, W // 2
        grad, out = grad.reshape(N, H, 2, W, 2, C), grad.new_zeros(N, H + 1, W + 1, 2, 2, C)
        for j, k in PHASES:
            out[:, j : H + j, k : W + k, j, k] = grad[:, :, j, :, k]
        return out


class Beside:
    """A stage's input x [B, T, H, W, C'], which its output is added to when doubled: `time` frames for one, the stream's `first` frame kept single."""

    def __init__(self, x_BTHWC: Tensor, time: int, first: bool):
        self.x, self.time, self.first = x_BTHWC, time, first

    def doubled(self, outputs: int) -> Tensor:
        return duplicate_up(self.x, outputs, self.time, self.first)


def interleave(y_NHWJKC: Tensor, frames: int, beside: Beside | None = None, bias: Tensor | None = None) -> Tensor:
    """[N / frames, frames, 2H, 2W, C]: the four phases as one image (`Interleave`), plus bias, plus the doubled `beside`."""
    if bias is not None and fuses(y_NHWJKC, bias, None if beside is None else beside.x):
        from . import triton_frames

        given = None if beside is None else (beside.x, frames, beside.time, beside.time - 1 if beside.first else 0)
        return triton_frames.interleave(y_NHWJKC, bias, given).unflatten(0, (-1, frames))
    out = Interleave.apply(y_NHWJKC if bias is None else y_NHWJKC + bias).unflatten(0, (-1, frames))
    return out if beside is None else out + beside.doubled(out.shape[-1])


def duplicate_up(x_BTHWC: Tensor, outputs: int, time: int, first: bool) -> Tensor:
    """Parameter-free shortcut of the decoder: out[co, time t + i, 2h + j, 2w + k] = x[(co 4 time + 4 i + 2 j + k) // rep], rep = 4 time outputs / C.

    At the start of a stream the leading time - 1 frames are dropped.
    """
    B, T, H, W, C = x_BTHWC.shape
    repeats = outputs * 4 * time // C
    blocks = x_BTHWC.unsqueeze(-1).expand(B, T, H, W, C, repeats).reshape(B, T, H, W, outputs, time, 2, 2)
    out = blocks.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(B, T * time, 2 * H, 2 * W, outputs)
    return out[:, time - 1 :] if first else out


def paired(y_BTHWC: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B, T, H, W, 2C] -> [B, 2T, H, W, C]: the two halves of the channels become two frames, first half first; plus bias [2C]."""
    B, T, H, W, C = y_BTHWC.shape
    halves = y_BTHWC.view(B, T, H, W, 2, C // 2).permute(0, 1, 4, 2, 3, 5)
    if bias is None:
        return halves.reshape(B, 2 * T, H, W, C // 2)
    if fuses(y_BTHWC, bias):
        from . import triton_frames

        return triton_frames.paired(y_BTHWC, bias)
    out = y_BTHWC.new_empty(B, T, 2, H, W, C // 2)
    torch.add(halves, bias.view(2, 1, 1, C // 2), out=out)
    return out.flatten(1, 2)


def to_patches(x_BCTHW: Tensor) -> Tensor:
    """Pixels [B,3,T,H,W] -> [B,T,H/2,W/2,12], channel = c*4 + column*2 + row (the column is the slower one, spec inference §5.2)."""
    B, C, T, H, W = x_BCTHW.shape
    return x_BCTHW.reshape(B, C, T, H // PATCH, PATCH, W // PATCH, PATCH).permute(0, 2, 3, 5, 1, 6, 4).reshape(B, T, H // PATCH, W // PATCH, -1)


def from_patches(x_BTHWC: Tensor) -> Tensor:
    """The inverse of `to_patches`."""
    B, T, H, W, C = x_BTHWC.shape
    return x_BTHWC.reshape(B, T, H, W, C // PATCH**2, PATCH, PATCH).permute(0, 4, 1, 2, 6, 3, 5).reshape(B, -1, T, H * PATCH, W * PATCH)


def patches_to_bytes(x_BTHWC: Tensor, bias: Tensor | None = None) -> Tensor:
    """Patches in [-1, 1], plus bias -> uint8 [B, T, H, W, 3], rounded and clamped."""
    if bias is not None and x_BTHWC.shape[-1] == 3 * PATCH**2 and fuses(x_BTHWC, bias):
        from . import triton_frames

        return triton_frames.to_bytes(x_BTHWC, bias)
    return to_uint8(from_patches(x_BTHWC if bias is None else x_BTHWC + bias))
