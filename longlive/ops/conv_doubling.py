"""Rows and columns doubled, then a 3x3 convolution, then the stage's doubled input added: on Hopper and datacentre Blackwell one kernel, in
half precision or FP8.

Of the three rows that an output row reads, two are the same source row, so their taps add up: output row 2h + j reads source rows h + j - 1 and h + j, with
taps (w0, w1 + w2) for j = 0 and (w0 + w1, w2) for j = 1; columns likewise. Four taps a phase (j, k) instead of nine.

In FP8 the weights have a scale per phase and output channel, the activations one per frame, which is the largest of its values / 448, found on the device.

Legend: B batch, T frames, N = B * T, H W rows and columns of the small grid, C or I channels in, O out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .fp8 import DTYPE, LARGEST, quantise_rows, to_e4m3
from .frames import Beside, interleave
from .inference import fuses
from .packed import divided
from .triton_available import fused_fp8_tiles, fused_roles, fused_tiles

MULTIPLE = 64  # channels in and out


def phases(weight_OIHW: Tensor) -> Tensor:
    """[4 O, I, 2, 2]: the taps of phase (j, k), j slower. Sums are formed in at least float32."""
    w = weight_OIHW.to(torch.promote_types(weight_OIHW.dtype, torch.float32))
    rows = torch.stack([torch.stack([w[:, :, 0], w[:, :, 1] + w[:, :, 2]], 2), torch.stack([w[:, :, 0] + w[:, :, 1], w[:, :, 2]], 2)])
    left, right = torch.stack([rows[..., 0], rows[..., 1] + rows[..., 2]], -1), torch.stack([rows[..., 0] + rows[..., 1], rows[..., 2]], -1)
    return torch.stack([left, right], 1).flatten(0, 2).to(weight_OIHW.dtype)


def tap_rows(phases_OIHW: Tensor) -> Tensor:
    """[4 taps * 4 O, I], tap (h, w) major."""
    return phases_OIHW.permute(2, 3, 0, 1).flatten(0, 2).contiguous()


def quantise_phases(weight_OIHW: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 `tap_rows`, scales float32 [4 O]) of a 3x3 kernel. InputError: infinity or NaN."""
    taps = phases(weight_OIHW.detach().float())
    rows = quantise_rows(taps.flatten(1))
    return tap_rows(rows.codes.view(taps.shape)).view(DTYPE), rows.scales.squeeze(1)


def fits(x_BTHWC: Tensor, weight: Tensor, pad: tuple[int, int], beside: Beside | None) -> bool:
    """Whether the kernel serves a half-precision `x` and a weight [O, I, ...] of its dtype, zeros all around, and a `beside` of O or 2 O channels."""
    half = x_BTHWC.dtype in (torch.bfloat16, torch.float16)
    served = fuses(x_BTHWC, weight, None if beside is None else beside.x) and fused_tiles(x_BTHWC)
    return half and served and pad == (1, 1) and _tiles(*weight.shape[:2], beside)


def _tiles(outputs: int, inputs: int, beside: Beside | None) -> bool:
    return outputs % MULTIPLE == 0 and inputs % MULTIPLE == 0 and (beside is None or beside.x.shape[-1] in (outputs, 2 * outputs))


def _given(beside: Beside | None, frames: int) -> tuple[Tensor, int, int, int] | None:
    return None if beside is None else (beside.x, frames, beside.time, beside.time - 1 if beside.first else 0)


def _fused(x: Tensor, *operands) -> Tensor:
    """The kernel of this card."""
    if fused_roles(x):
        from . import hopper_doubling

        return hopper_doubling.doubled(x, *operands)
    from . import triton_doubling

    return triton_doubling.doubled(x, *operands)


def doubled(x_BTHWC: Tensor, rows: Tensor, bias: Tensor, beside: Beside | None) -> Tensor:
    """[B, T, 2H, 2W, O], where `fits`."""
    return _fused(x_BTHWC.flatten(0, 1), rows, bias, _given(beside, x_BTHWC.shape[1])).unflatten(0, x_BTHWC.shape[:2])


def quantise_frames(x_NHWC: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 codes, scales float32 [N], the largest magnitude of the frame / 448, 1 for a frame of zeros). Infinity and NaN make NaN. No synchronisation."""
    wide = x_NHWC.float()
    size = wide.abs().amax((1, 2, 3))
    scales = torch.where(size == 0, 1.0, divided(size, LARGEST).clamp(min=torch.finfo(torch.float32).tiny))
    return to_e4m3(wide * (torch.ones_like(scales) / scales)[:, None, None, None]), scales


def doubled_fp8(x_BTHWC: Tensor, rows: Tensor, scales: Tensor, bias: Tensor, beside: Beside | None) -> Tensor:
    """[B, T, 2H, 2W, O] in bias's dtype from rows and scales of `quantise_phases`, x put in FP8 by `quantise_frames`. No gradient passes."""
    x, frames, outputs = x_BTHWC.flatten(0, 1), x_BTHWC.shape[1], len(bias)
    if fuses(x, bias, None if beside is None else beside.x) and fused_fp8_tiles(x) and _tiles(outputs, x.shape[-1], beside):
        from . import triton_doubling

        codes, of_frames = triton_doubling.quantise_frames(x)
        return _fused(codes, rows, bias, _given(beside, frames), (of_frames, scales)).unflatten(0, x_BTHWC.shape[:2])
    codes, of_frames = quantise_frames(x)
    taps = (rows.float().unflatten(0, (4, -1)) * scales[:, None]).unflatten(0, (2, 2)).permute(2, 3, 0, 1)
    y = F.conv2d((codes.float() * of_frames[:, None, None, None]).permute(0, 3, 1, 2), taps, padding=1).permute(0, 2, 3, 1)
    wide = None if beside is None else Beside(beside.x.float(), beside.time, beside.first)
    return interleave(y.unflatten(-1, (2, 2, -1)), frames, wide, bias.float()).to(bias.dtype)
