"""Distribution matching distillation as pure functions: score levels, the gradient of the student, the losses (spec training §6.3, §6.4).

The student's film x is noised to a level; the critic says what the student's own films look like there, the teacher what they should look like. Their
difference, divided by how far x is from what the teacher wants, is the gradient. The critic learns flow matching on the student's films.

Legend: B batch, F latent frames, c chunks, C latent channels, H W latent rows and columns. Levels are sigma in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..diffusion.flow import denoising_steps, shifted, warp_denoising_steps

LEAST, MOST = 20, 980  # timesteps that scores are asked at
EPSILON = 1e-6


def draw_timesteps(batch: int, chunks: int, generator: torch.Generator, *, low: int = 0, high: int = 1000, per_chunk: bool = False) -> torch.Tensor:
    """Unshifted timesteps [B, c], int64, uniform in [low, high): one for a whole film, or one for each chunk."""
    drawn = torch.randint(low, max(high, low + 1), (batch, chunks if per_chunk else 1), generator=generator, device=generator.device)
    return drawn.expand(batch, chunks)


def score_timesteps(raw: torch.Tensor, shift: float) -> torch.Tensor:
    """Timesteps at which the scores are asked: shifted, and kept between LEAST and MOST. In float64, unless `raw` comes in another float type."""
    wide = raw if raw.is_floating_point() else raw.double()
    return (1000 * shifted(wide / 1000, shift)).clamp(LEAST, MOST)


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """cond + scale (cond - uncond): a documented scale of 3 is 4 in the usual convention."""
    return conditional + scale * (conditional - unconditional)


def dmd_gradient(
    x_BFCHW: torch.Tensor, real_BFCHW: torch.Tensor, fake_BFCHW: torch.Tensor, mask_BF: torch.Tensor, chunk_frames: int, epsilon: float = EPSILON
) -> torch.Tensor:
    """(fake - real) / (mean |x - real| of the chunk + epsilon), float64; 0 where `mask_BF` is 0. Frames outside the mask do not count in the mean (D18)."""
    x, real, fake = (t.detach().double() for t in (x_BFCHW, real_BFCHW, fake_BFCHW))
    mask = mask_BF.double()
    distance_Bc = ((x - real).abs().mean((2, 3, 4)) * mask).unflatten(1, (-1, chunk_frames)).sum(2)
    distance_Bc = distance_Bc / mask.unflatten(1, (-1, chunk_frames)).sum(2).clamp(min=1)
    distance_BF = (distance_Bc + epsilon).repeat_interleave(chunk_frames, 1)
    return (fake - real) / distance_BF[..., None, None, None] * mask[..., None, None, None]


def dmd_loss(x_BFCHW: torch.Tensor, gradient_BFCHW: torch.Tensor, mask_BF: torch.Tensor) -> torch.Tensor:
    """0.5 mean (x - stopgrad(x - gradient))^2 over the frames of the mask, float64: its gradient in x is `gradient` / number of elements."""
    x = x_BFCHW.double()
    error_BF = (x - (x - gradient_BFCHW).detach()).square().mean((2, 3, 4))
    return 0.5 * (error_BF * mask_BF).sum() / mask_BF.sum().clamp(min=1)


def velocity_loss(velocity_BFCHW: torch.Tensor, target_BFCHW: torch.Tensor, mask_BF: torch.Tensor) -> torch.Tensor:
    """Mean (v - target)^2 over the frames of the mask, on the velocity itself (D8). The critic's target is noise - x."""
    wide = torch.promote_types(velocity_BFCHW.dtype, torch.float32)
    error_BF = (velocity_BFCHW.to(wide) - target_BFCHW).square().mean((2, 3, 4))
    return (error_BF * mask_BF).sum() / mask_BF.sum().clamp(min=1)


def off_policy_levels(listed: Sequence[float] | None, steps: int, shift: float, *, warp: bool) -> list[float]:
    """Levels at which films of the data are noised: the timesteps `listed`, shifted with `warp`, else those of `steps` steps. 0 is left out (D23)."""
    if listed is None:
        timesteps = [float(t) for t in denoising_steps(steps, shift)]
    else:
        timesteps = warp_denoising_steps([int(t) for t in listed], shift).tolist() if warp else list(listed)
    return [t / 1000 for t in timesteps if t > 0]
