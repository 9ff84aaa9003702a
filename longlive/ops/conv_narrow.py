"""3x3x3 convolutions to so few channels that tensor cores run empty: the VAE's last one, 256 -> 12 at the full size. Their bias is left to the next step.

On Hopper and datacentre Blackwell, in half precision and without gradients, a product over columns and a sum over frames and rows (`triton_narrow`), both in
float32; elsewhere the library's convolution.

Legend: B batch, T output frames, H W rows and columns, C channels in, O out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .inference import fuses
from .triton_available import fused_tiles

TILE, MULTIPLE = 128, 64  # columns of a product; channels in


def fits(x_BTHWC: Tensor, weight_OITHW: Tensor, stride: tuple[int, ...], pad: tuple[int, int]) -> bool:
    """Whether the kernels serve this convolution: 3x3x3, stride 1, 4, 8 or 12 outputs, channels in 64s, rows padded by 0 or 1 and columns by 1."""
    outputs, inputs, *size = weight_OITHW.shape
    shape = size == [3, 3, 3] and outputs % 4 == 0 and 9 * outputs <= TILE and inputs % MULTIPLE == 0
    half = x_BTHWC.dtype in (torch.bfloat16, torch.float16)
    return shape and half and set(stride) == {1} and pad[0] in (0, 1) and pad[1] == 1 and fuses(x_BTHWC, weight_OITHW) and fused_tiles(x_BTHWC)


def tap_rows(weight_OITHW: Tensor) -> Tensor:
    """[3 * TILE, I]: for each column of the kernel the taps (t, h, output), filled up with zeros."""
    columns = weight_OITHW.permute(4, 2, 3, 0, 1).flatten(1, 3)
    return F.pad(columns, (0, 0, 0, TILE - columns.shape[1])).flatten(0, 1).contiguous()


def convolution(x_BTHWC: Tensor, rows: Tensor, outputs: int, pad: int) -> Tensor:
    """The convolution of x [B, T + 2, H, W, C], zeros beside it and `pad` rows of zeros above and below it: [B, T, H - 2 + 2 pad, W, O]."""
    from . import triton_narrow

    return triton_narrow.convolution(x_BTHWC, rows, outputs, pad)
