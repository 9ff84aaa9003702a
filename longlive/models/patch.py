"""Latents <-> tokens: a token is a 2x2 square of one latent frame; tokens run frame by frame, row by row.

Legend: B batch, F latent frames, C channels, H, W latent rows and columns, N = F * H/2 * W/2 tokens, c = 4 C features of a token.
"""

from __future__ import annotations

import torch
from einops import rearrange

from ..core.geometry import PATCH


def patchify(z_BFCHW: torch.Tensor) -> torch.Tensor:
    """Latents to tokens x_BNc, features in the order (C, row, column), as the patch embedding's weight has them."""
    return rearrange(z_BFCHW, "b f c (h p) (w q) -> b (f h w) (c p q)", p=PATCH, q=PATCH)


def unpatchify(y_BNc: torch.Tensor, frames: int, token_height: int, token_width: int) -> torch.Tensor:
    """Head output to latents z_BFCHW; the head's features are in the order (row, column, C)."""
    return rearrange(y_BNc, "b (f h w) (p q c) -> b f c (h p) (w q)", f=frames, h=token_height, w=token_width, p=PATCH, q=PATCH)
