"""Known frames: the first K latent frames of a film are given, the model paints the rest.

K = 0 is text to video, K = 1 image to video, K > 1 video extension; nothing else differs. A known frame enters every step clean, with
noise level 0, and is never changed. (Spec inference §2.8.)

Legend: B batch, F latent frames of a chunk, K known frames, C, H, W latent channels, rows, columns.
"""

from __future__ import annotations

import torch

from ..core.errors import InputError


class KnownFrames:
    """The latents z [B or 1, K, C, H, W] that the film begins with; `part` cuts out what falls into a chunk."""

    def __init__(self, z_BFCHW: torch.Tensor):
        if z_BFCHW.dim() != 5:
            raise InputError(f"known frames are latents [batch, frames, channels, height, width]; got shape {tuple(z_BFCHW.shape)}")
        self.z_BFCHW = z_BFCHW

    @property
    def frames(self) -> int:
        return self.z_BFCHW.shape[1]

    def part(self, start: int, frames: int) -> "KnownFrames":
        """The known ones among the film's latent frames [start, start + frames); they are the first of the chunk."""
        return KnownFrames(self.z_BFCHW[:, start : start + frames])

    def clamp(self, x_BFCHW: torch.Tensor) -> torch.Tensor:
        """`x_BFCHW` with its first K frames replaced by the known ones."""
        if not self.frames:
            return x_BFCHW
        z = self.z_BFCHW.to(x_BFCHW).expand(x_BFCHW.shape[0], -1, -1, -1, -1)
        return torch.cat((z, x_BFCHW[:, self.frames :]), dim=1)

    def levels(self, sigma_BF: torch.Tensor) -> torch.Tensor:
        """`sigma_BF` with 0 for the known frames."""
        return torch.cat((torch.zeros_like(sigma_BF[:, : self.frames]), sigma_BF[:, self.frames :]), dim=1)


def nothing_known(x_BFCHW: torch.Tensor) -> KnownFrames:
    """Zero known frames for latents like `x_BFCHW`."""
    return KnownFrames(x_BFCHW[:, :0])
