"""Flow matching: x = (1 - sigma) clean + sigma noise, and the velocity that leads from clean to noise.

A noise level sigma lies in [0, 1]; a timestep t is 1000 sigma. The schedule is *shifted*: more of its levels lie near 1, since a video
of many pixels stays recognisable under much noise. (Spec inference §1.3, §3; training §3.1, §3.3.)

Legend: any shape for samples; sigma broadcasts from the left ([B, F] against [B, F, C, H, W]).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch

TRAIN_STEPS = 1000


def shifted(u: torch.Tensor, shift: float) -> torch.Tensor:
    """shift u / (1 + (shift - 1) u): the noise level of the unshifted level `u`."""
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True)
class TrainTable:
    """The levels that training draws from, descending: sigmas, timesteps = 1000 sigmas, loss weights; float32 [steps] each."""

    sigmas: torch.Tensor
    timesteps: torch.Tensor
    weights: torch.Tensor

    def nearest(self, timestep: torch.Tensor) -> torch.Tensor:
        """Index of the table entry nearest to each timestep (the first of two equally near)."""
        return (self.timesteps.to(timestep.device) - timestep.unsqueeze(-1)).abs().argmin(-1)


def train_table(shift: float, steps: int = TRAIN_STEPS) -> TrainTable:
    """The training table. Weights are a bell around t = 500, lowered to 0 at its end and of mean 1 (spec training §3.3)."""
    sigmas = shifted(torch.linspace(1, 0, steps + 1)[:-1], shift)
    timesteps = sigmas * 1000
    bell = torch.exp(-2 * ((timesteps - 500) / 1000) ** 2)
    lowered = bell - bell.min()
    return TrainTable(sigmas, timesteps, lowered * (steps / lowered.sum()))


def _like(sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return sigma.reshape(*sigma.shape, *[1] * (x.dim() - sigma.dim()))


def add_noise(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(1 - sigma) clean + sigma noise."""
    sigma = _like(sigma, clean)
    return ((1 - sigma) * clean + sigma * noise).to(clean.dtype)


def velocity_target(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the model learns: noise - clean."""
    return noise - clean


def x0_from_velocity(x: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The clean sample that `velocity` points at: x - sigma velocity; in float64, returned in the dtype of `x`."""
    return (x.double() - _like(sigma, x).double() * velocity.double()).to(x.dtype)


def velocity_from_x0(x: torch.Tensor, clean: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Inverse of `x0_from_velocity`: (x - clean) / sigma; sigma > 0."""
    return ((x.double() - clean.double()) / _like(sigma, x).double()).to(x.dtype)


def denoising_steps(steps: int, shift: float) -> list[int]:
    """Timesteps of a `steps`-step training list with its trailing 0, truncated to integers: 1000, 937, 833, 625, 0 for 4 and shift 5."""
    exact = Fraction(shift)
    levels = (Fraction(steps - i, steps) for i in range(steps + 1))
    return [int(1000 * exact * u / (1 + (exact - 1) * u)) for u in levels]


def warp_denoising_steps(steps: list[int], shift: float) -> torch.Tensor:
    """Shifted float32 timesteps of a list of unshifted integer ones (the training table's entries, and 0 for 0)."""
    table = torch.cat((train_table(shift).timesteps, torch.zeros(1)))
    return table[TRAIN_STEPS - torch.tensor(steps)]
