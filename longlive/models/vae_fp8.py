"""The VAE's decoder with its residual convolutions in FP8, 92 % of its multiplications.

Each of them reads the SiLU of a norm, which needs no scale (`ops.conv_fp8`); their weights have a scale per output channel. Convolutions that read something
else (the first, the doubling ones, those over time alone, the head) stay as they are. A stream's state then holds codes where such a layer remembers frames.

Legend: B batch, T frames, H W rows and columns, C channels innermost.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..ops.conv_fp8 import convolution_fp8, empty_past, norm_silu_fp8, quantise_weight
from .wan_vae import Conv, Residual, Walk, WanVAE

KERNEL = (3, 3, 3)
BEHIND_NORMS = ("2", "6")


class Fp8Conv(nn.Module):
    """A 3x3x3 convolution behind a norm. Codes and the bits of the scales are integers, which no cast of the model changes."""

    def __init__(self, conv: Conv):
        super().__init__()
        codes, scales = quantise_weight(conv.weight)
        self.register_buffer("codes", codes.view(torch.uint8))
        self.register_buffer("scale_bits", scales.view(torch.int32))
        self.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)

    border = (0, 0, 0, 0)  # the frames bring their own

    @property
    def sizes(self) -> tuple[int, ...]:
        """(O, C, 3, 3, 3), the shape of the weight that was replaced."""
        return self.codes.shape[1], self.codes.shape[2], *KERNEL

    def of_normed(self, x_BTHWC: Tensor, gamma: Tensor, walk: Walk, bias: Tensor | None = None) -> tuple[Tensor, None]:
        """As `Conv.of_normed`; nothing is left to add."""
        return self._convolve(x_BTHWC, gamma, walk, bias, None), None

    def of_normed_beside(self, x_BTHWC: Tensor, gamma: Tensor, walk: Walk, bias: Tensor | None, beside_BTHWC: Tensor) -> Tensor:
        return self._convolve(x_BTHWC, gamma, walk, bias, beside_BTHWC)

    def _convolve(self, x_BTHWC: Tensor, gamma: Tensor, walk: Walk, bias: Tensor | None, beside_BTHWC: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and x_BTHWC.requires_grad:
            raise InputError("a decoder in FP8 gives no gradients; set inference.vae_fp8: false")
        if not walk.spatial.whole:
            raise InputError("a decoder in FP8 works on whole frames; set inference.vae_fp8: false to decode in parts")
        frames = walk.leave(norm_silu_fp8(x_BTHWC, gamma, walk.before(lambda: empty_past(x_BTHWC)), bias))
        return walk.spatial.convolve(self, frames, beside=beside_BTHWC)

    def kernel(self, frames: Tensor, pad: tuple[int, int], *, beside: Tensor | None) -> Tensor:
        """The bare convolution of frames with their border, plus `beside`."""
        return convolution_fp8(frames, self.codes.view(torch.float8_e4m3fn), self.scale_bits.view(torch.float32), self.bias, beside)


@torch.no_grad()
def decoder_to_fp8(vae: WanVAE) -> int:
    """Replaces the decoder's residual convolutions in place; how many. Raises InputError for a decoder that has none left."""
    replaced = 0
    for block in vae.decoder.modules():
        if isinstance(block, Residual):
            for name in BEHIND_NORMS:
                conv = block.residual[name]
                if isinstance(conv, Conv) and tuple(conv.weight.shape[2:]) == KERNEL:
                    block.residual[name] = Fp8Conv(conv)
                    replaced += 1
    if not replaced:
        raise InputError("the decoder has no convolution left to put in FP8; convert it once")
    return replaced
