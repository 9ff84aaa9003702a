"""Metadata that travels with the tokens, one entry per latent frame; masks, rotation and modulation read it, never the layout.

Legend: B batch, F latent frames in the sequence, G prompt groups, N = F * height * width tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tokens:
    """A sequence of F latent frames of height x width tokens each, frame-major, rows before columns.

    position_BF  float64, temporal position of each frame (shot offset included; fractional allowed)
    chunk_F      int64, index of the chunk that a frame belongs to
    noisy_F      bool, True for frames being denoised, False for clean context
    prompt_BG    int64, row of the text context per group of F/G consecutive frames
    height, width  tokens per frame
    """

    position_BF: torch.Tensor
    chunk_F: torch.Tensor
    noisy_F: torch.Tensor
    prompt_BG: torch.Tensor
    height: int
    width: int

    @property
    def frames(self) -> int:
        return self.chunk_F.shape[0]

    @property
    def frame_tokens(self) -> int:
        return self.height * self.width
