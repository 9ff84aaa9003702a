"""What a trained VAE is measured by: fidelity on held-out clips and the statistics that normalise its latents.

Statistics have two rows: the first latent of a stream encodes one frame, every other four, and their distributions differ.

Legend: T pixel frames, F latent frames, C latent channels, K = 2 rows, P frame parameters.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..core.geometry import Geometry
from ..models.wan_vae import WanVAE
from .vae_objective import Fidelity
from .world_windows import render_clips

LAST_FRAMES = 25


def latent_statistics(vae: WanVAE, clips_1TP: Iterable[torch.Tensor], geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the posterior mean per channel, float32 [2, C]: row 0 first latents, row 1 all others."""
    count, total, square = torch.zeros(2, 1, dtype=torch.float64), 0.0, 0.0
    for params in clips_1TP:
        mu_BCFHW = vae.encode(render_clips(params, geometry.height, geometry.width).video, keep=False)[0]
        channels = vae.dims.z_dim
        parts = (mu_BCFHW[:, :, :1], mu_BCFHW[:, :, 1:])
        rows = [p.double().transpose(0, 1).reshape(channels, -1) for p in parts]
        total = total + torch.stack([r.sum(1) for r in rows]).cpu()
        square = square + torch.stack([r.square().sum(1) for r in rows]).cpu()
        count += torch.tensor([[r.shape[1]] for r in rows])
    mean = total / count
    return mean.float(), (square / count - mean.square()).clamp(min=1e-8).sqrt().float()


def fidelity(vae: WanVAE, clips_1TP: Iterable[torch.Tensor], geometry: Geometry) -> tuple[float, float, float]:
    """PSNR in dB of reconstructions from the posterior mean: whole frames, inside characters, and of the last 25 frames of each clip."""
    everything, ending = Fidelity(), Fidelity()
    for params in clips_1TP:
        pixels = render_clips(params, geometry.height, geometry.width)
        mu, _, _ = vae.encode(pixels.video, keep=False)
        output, _ = vae.decode(mu, keep=False)
        everything.add(output, pixels.video, pixels.mask)
        ending.add(*(x[:, :, -LAST_FRAMES:] for x in (output, pixels.video, pixels.mask)))
    return *everything.psnr(), ending.psnr()[0]
