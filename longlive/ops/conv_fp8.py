"""3x3x3 convolutions of the VAE in FP8: e4m3 weights with a scale per output channel, e4m3 activations as they are.

What is convolved is the SiLU of a normed activation: of order one, never above a few dozen, so that it lies well within e4m3 (2^-9 to 448, relative steps of
1/16 above 2^-6) and needs no scale. The codes are exact in float32, in which the reference convolves them; the kernel adds up in another order.

Frames carry a border of one zero row and column on each side and the two frames of the past in front, which is what the kernel reads.

Legend: B batch, T output frames, H W rows and columns, PH = H + 2, PW = W + 2, C channels in, O out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .fp8 import DTYPE, quantise_rows, to_e4m3
from .frames import norm_silu
from .inference import fuses
from .triton_available import fused_fp8_tiles, fused_roles

MULTIPLE = 64  # channels in and out


def quantise_weight(weight_OITHW: Tensor) -> tuple[Tensor, Tensor]:
    """(codes e4m3 [27, O, I], tap (t, h, w) major; scales float32 [O]) of a 3x3x3 kernel. A channel of zeros has scale 1. InputError: infinity or NaN."""
    rows = quantise_rows(weight_OITHW.detach().flatten(1))
    codes = rows.codes.view(weight_OITHW.shape).permute(2, 3, 4, 0, 1).flatten(0, 2).contiguous()
    return codes.view(DTYPE), rows.scales.squeeze(1)


def fits(inputs: int, outputs: int) -> bool:
    """Whether the kernel takes such channel counts."""
    return inputs % MULTIPLE == 0 and outputs % MULTIPLE == 0


def tensor_cores(x: Tensor) -> bool:
    """Whether products in FP8 have a kernel where `x` is (`fp8_tiles_lack`)."""
    return fuses(x) and fused_fp8_tiles(x)


def empty_past(x_BTHWC: Tensor) -> Tensor:
    """What came before a stream: two frames of zeros."""
    B, _, H, W, C = x_BTHWC.shape
    return torch.zeros(B, 2, H + 2, W + 2, C, dtype=DTYPE, device=x_BTHWC.device)


def norm_silu_fp8(x_BTHWC: Tensor, gamma: Tensor, past: Tensor, bias: Tensor | None = None) -> Tensor:
    """e4m3 of `norm_silu(x + bias)`, with border, behind `past` [B, 2, PH, PW, C]: [B, 2 + T, PH, PW, C]."""
    if tensor_cores(x_BTHWC):
        from . import triton_conv

        return triton_conv.norm_silu_fp8(x_BTHWC, bias, gamma.flatten(), past)
    y = norm_silu(x_BTHWC.float(), gamma.float(), None, None if bias is None else bias.float())
    y = to_e4m3(F.pad(y, (0, 0, 1, 1, 1, 1)))
    return torch.cat([past.view(torch.uint8), y.view(torch.uint8)], 1).view(DTYPE)


def convolution_fp8(frames: Tensor, codes: Tensor, scales: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """The convolution of FP8 frames [B, 2 + T, PH, PW, C], plus bias, plus residual: [B, T, H, W, O] in the dtype of bias. No gradient passes."""
    if tensor_cores(bias) and fits(frames.shape[-1], codes.shape[1]):
        if fused_roles(bias):
            from . import hopper_conv

            return hopper_conv.convolution(frames, codes, scales, bias, residual)
        from . import triton_conv

        return triton_conv.convolution(frames, codes, scales, bias, residual)
    weight = (codes.float() * scales[:, None]).unflatten(0, (3, 3, 3)).permute(3, 4, 0, 1, 2)
    y = F.conv3d(frames.float().permute(0, 4, 1, 2, 3), weight, bias.float()).permute(0, 2, 3, 4, 1)
    return (y if residual is None else y + residual.float()).to(bias.dtype)
