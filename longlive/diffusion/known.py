"""Known frames: the first K latent frames of a film are given, the model paints the rest.

K = 0 is text to video, K = 1 image to video, K > 1 video extension; nothing else differs. A known frame enters every step clean, with
noise level 0, and is never changed. (Spec inference §2.8.)

Legend: B batch, F latent frames of a chunk, K known frames, C, H, W latent channels, rows, columns.
"""

from __future__ import annotations

import torch

from ..core.errors import InputError


class KnownFrames:
    """Given latents z [B or 1, K, C, H, W] of the film's frames from `start` on; `part` cuts out what falls into a chunk.

    `start` is the first frame of a chunk: 0 for a film that begins with them, later for a shot that does.
    """

    def __init__(self, z_BFCHW: torch.Tensor, start: int = 0):
        if z_BFCHW.dim() != 5:
            raise InputError(f"known frames are latents [batch, frames, channels, height, width]; got shape {tuple(z_BFCHW.shape)}")
        self.z_BFCHW, self.start = z_BFCHW, start

    @property
    def frames(self) -> int:
        return self.z_BFCHW.shape[1]

    def part(self, start: int, frames: int) -> "KnownFrames":
        """The known ones among the film's latent frames [start, start + frames); they are the first of the chunk."""
        skip = start - self.start
        stop = max(0, skip + frames) if skip >= 0 else 0
        return KnownFrames(self.z_BFCHW[:, max(0, skip) : stop], start)

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
