"""Frames -> latents on the ranks that share samples, the cheaper of two ways for the busiest rank.

Whole samples: each rank encodes every P-th sample, then latents are gathered; exact, and nothing is encoded twice. Windows: each rank encodes its
stretch of every sample after a halo of `infra.vae_halo_latents` (spec training §5.5); exact from 27 latents on for the Wan2.2 VAE.

Legend: B batch, T pixel frames, F latent frames, C latent channels, H W pixel rows and columns, P ranks.
"""

from __future__ import annotations

import torch

from ..core.geometry import SPATIAL_STRIDE, latent_frames
from ..data.encoding import PIECE, encode_frames
from ..data.samples import to_pixels
from ..models.codec import VideoCodec
from ..models.vae_reach import exact_halo
from ..parallel.halo import HaloWindow, check_halo, halo_encode, halo_windows
from ..parallel.mesh import Mesh
from ..parallel.samples import encode_samples


def whole_samples(batch: int, windows: list[HaloWindow]) -> bool:
    """Whether the busiest rank encodes at most as many latent frames when each rank takes whole samples."""
    film, ranks = windows[-1].keep_end, len(windows)
    return -(-batch // ranks) * film <= batch * max(window.drop_latents + window.local_latent_frames for window in windows)


@torch.no_grad()
def encode_shared(codec: VideoCodec, frames_BTHW3: torch.Tensor, mesh: Mesh, halo: int) -> torch.Tensor:
    """uint8 [B, T, H, W, 3], equal on the ranks of an sp group -> latents [B, F, C, H/16, W/16] float32 on all of them."""
    if mesh.sp_size == 1:
        return encode_frames(codec, frames_BTHW3)
    batch, frames, height, width, _ = frames_BTHW3.shape
    film = latent_frames(frames)
    windows = halo_windows(film, mesh.sp_size, halo)
    if whole_samples(batch, windows):
        latents = torch.empty(batch, film, codec.vae.dims.z_dim, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE, device=codec.device)
        return encode_samples(lambda sample: encode_frames(codec, frames_BTHW3[sample : sample + 1])[0], latents, mesh)
    check_halo(halo, exact_halo(codec.vae.encoder))
    own = windows[mesh.sp_rank]
    pixels = (to_pixels(one[None, own.raw_start : own.raw_end], codec.device, codec.dtype) for one in frames_BTHW3)
    return torch.cat([halo_encode(codec, clip, own, mesh, group=PIECE) for clip in pixels])
