"""The reconstruction loss of the VAE and the numbers that judge it.

Loss = L1 + mse_weight MSE + edge_weight edge-L1, each with pixel weight 1 + mask_weight mask, + kl_weight KL per latent value.
Pixels are in [-1, 1], peak to peak 2. The mask is 1 inside characters, which are small: without it they are the last thing to be learned.

Legend: B batch, T frames, H W pixels, C latent channels, F latent frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class VAELossWeights:
    mse: float = 2.0
    edge: float = 0.5
    kl: float = 3e-4
    mask: float = 4.0


def sample_posterior(mu_BCFHW: torch.Tensor, logvar_BCFHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(mu_BCFHW.shape, generator=generator, device=mu_BCFHW.device, dtype=torch.float32)
    return mu_BCFHW.float() + torch.exp(0.5 * logvar_BCFHW.float()) * noise


def kl_mean(mu_BCFHW: torch.Tensor, logvar_BCFHW: torch.Tensor) -> torch.Tensor:
    """KL(posterior || unit normal) in nats, mean over latent values."""
    mu, logvar = mu_BCFHW.float(), logvar_BCFHW.float()
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()


def reconstruction_loss(output_B3THW: torch.Tensor, target_B3THW: torch.Tensor, mask_B1THW: torch.Tensor, weights: VAELossWeights) -> torch.Tensor:
    """The three pixel terms; all in float32."""
    error = output_B3THW.float() - target_B3THW.float()
    weight = 1 + weights.mask * mask_B1THW.float()
    loss = (weight * error.abs()).mean() + weights.mse * (weight * error.square()).mean()
    # The difference of neighbours of the error is the error of the neighbours' difference: an edge that is too soft, or misplaced.
    down, right = error.diff(dim=-2).abs(), error.diff(dim=-1).abs()
    return loss + weights.edge * ((weight[..., 1:, :] * down).mean() + (weight[..., 1:] * right).mean())


@dataclass
class Fidelity:
    """Running squared error over whole frames and inside characters; `psnr()` in dB for a peak-to-peak range of 2."""

    error: float = 0.0
    count: float = 0.0
    inside_error: float = 0.0
    inside_count: float = 0.0

    def add(self, output_B3THW: torch.Tensor, target_B3THW: torch.Tensor, mask_B1THW: torch.Tensor) -> None:
        squared = (output_B3THW.float().clamp(-1, 1) - target_B3THW.float()).square()
        mask = mask_B1THW.float()
        self.error += squared.double().sum().item()
        self.count += squared.numel()
        self.inside_error += (squared * mask).double().sum().item()
        self.inside_count += 3 * mask.double().sum().item()

    def psnr(self) -> tuple[float, float]:
        """(whole frames, inside characters)."""
        return decibel(self.error, self.count), decibel(self.inside_error, self.inside_count)


def decibel(error: float, count: float) -> float:
    return 10 * math.log10(4 * count / error) if error > 0 else math.inf
