"""The VAE's decoder with its residual and doubling convolutions in FP8, 97 % of its multiplications.

A residual convolution reads the SiLU of a norm, which needs no scale (`ops.conv_fp8`); a doubling one reads what no norm bounds and has a scale per frame
(`ops.conv_doubling`). Weights have a scale per output channel. The others (the first, those over time alone, shortcuts, the head) stay as they are. A stream's
state then holds codes where a residual convolution remembers frames.

Legend: B batch, T frames, H W rows and columns, C channels innermost.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..ops.conv_doubling import doubled_fp8, quantise_phases
from ..ops.conv_fp8 import convolution_fp8, empty_past, norm_silu_fp8, quantise_weight
from ..ops.frames import Beside
from .wan_vae import Conv, DoublingConv, Residual, Upsample, Walk, WanVAE

KERNEL = (3, 3, 3)
BEHIND_NORMS = ("2", "6")


class Fp8Weight(nn.Module):
    """Codes and the bits of the scales are integers, which no cast of the model changes."""

    border = (0, 0, 0, 0)  # that the frames bring, or the kernel adds

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor):
        super().__init__()
        self.register_buffer("codes", codes.view(torch.uint8))
        self.register_buffer("scale_bits", scales.view(torch.int32))
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def weight(self) -> tuple[Tensor, Tensor]:
        """(codes e4m3, scales float32)"""
        return self.codes.view(torch.float8_e4m3fn), self.scale_bits.view(torch.float32)


class Fp8Conv(Fp8Weight):
    """A 3x3x3 convolution behind a norm."""

    def __init__(self, conv: Conv):
        super().__init__(*quantise_weight(conv.weight), conv.bias)

    @property
    def sizes(self) -> tuple[int, ...]:
        """(O, C, 3, 3, 3), the shape of the weight that was replaced."""
        return self.codes.shape[1], self.codes.shape[2], *KERNEL

    def activated(self, x_BTHWC: Tensor, gamma: Tensor, walk: Walk, bias: Tensor | None = None) -> Tensor:
        """As `Conv.activated`, in codes with a border."""
        if torch.is_grad_enabled() and x_BTHWC.requires_grad:
            raise InputError("a decoder in FP8 gives no gradients; set inference.vae_fp8: false")
        if not walk.spatial.whole:
            raise InputError("a decoder in FP8 works on whole frames; set inference.vae_fp8: false to decode in parts")
        return walk.leave(norm_silu_fp8(x_BTHWC, gamma, walk.before(lambda: empty_past(x_BTHWC)), bias))

    def apart(self, frames: Tensor, walk: Walk) -> tuple[Tensor, None]:
        """As `Conv.apart`; nothing is left to add."""
        return walk.spatial.convolve(self, frames, beside=None), None

    def summed(self, frames: Tensor, walk: Walk, beside_BTHWC: Tensor) -> Tensor:
        return walk.spatial.convolve(self, frames, beside=beside_BTHWC)

    def kernel(self, frames: Tensor, pad: tuple[int, int], *, beside: Tensor | None) -> Tensor:
        """The bare convolution of frames with their border, plus `beside`."""
        return convolution_fp8(frames, *self.weight(), self.bias, beside)


class Fp8DoublingConv(Fp8Weight):
    """A `DoublingConv`."""

    def __init__(self, conv: DoublingConv):
        super().__init__(*quantise_phases(conv.weight), conv.bias)

    @property
    def sizes(self) -> tuple[int, ...]:
        """(O, C, 3, 3), the shape of the weight that was replaced."""
        return len(self.bias), self.codes.shape[1], 3, 3

    def kernel(self, x_BTHWC: Tensor, pad: tuple[int, int], *, beside: Beside) -> Tensor:
        """Plus the doubled `beside`."""
        return doubled_fp8(x_BTHWC, *self.weight(), self.bias, beside)


@torch.no_grad()
def decoder_to_fp8(vae: WanVAE) -> int:
    """Replaces the decoder's residual and doubling convolutions in place; how many. Raises InputError for a decoder that has none left."""
    replaced = 0
    for block in vae.decoder.modules():
        if isinstance(block, Residual):
            for name in BEHIND_NORMS:
                conv = block.residual[name]
                if isinstance(conv, Conv) and tuple(conv.weight.shape[2:]) == KERNEL:
                    block.residual[name] = Fp8Conv(conv)
                    replaced += 1
        if isinstance(block, Upsample) and isinstance(block.resample["1"], DoublingConv):
            block.resample["1"] = Fp8DoublingConv(block.resample["1"])
            replaced += 1
    if not replaced:
        raise InputError("the decoder has no convolution left to put in FP8; convert it once")
    return replaced
