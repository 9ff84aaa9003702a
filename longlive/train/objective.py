"""What a training step asks of the network, as pure functions: noise levels, noised latents, loss weights, masks.

Flow matching: x_sigma = (1 - sigma) x0 + sigma noise, and the network predicts v = noise - x0. Every chunk draws its own noise level as a
uniform index into the shift table (spec training §3.1), shared by its latent frames. Nothing here knows where clips come from or how the
network attends.

Legend: B batch, F latent frames, c chunks, C latent channels, H W latent rows and columns. Noise levels are sigma in [0, 1], float32 or wider.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..diffusion.flow import TrainTable, train_table


@dataclass(frozen=True)
class FlowTarget:
    """One noised copy of a batch of clips and what the network must say about it.

    noisy_BFCHW    network input
    target_BFCHW   velocity noise - x0
    sigma_BF       float64, noise level given to the network, one per latent frame
    weight_BF      loss weight of each frame
    mask_BF        1 where a frame counts, 0 where it does not (padding, known frames)
    """

    noisy_BFCHW: torch.Tensor
    target_BFCHW: torch.Tensor
    sigma_BF: torch.Tensor
    weight_BF: torch.Tensor
    mask_BF: torch.Tensor


def draw_indices(batch: int, chunks: int, generator: torch.Generator, *, low: int = 0, high: int = 1000) -> torch.Tensor:
    """Uniform table indices, int64 [batch, chunks], on the generator's device."""
    return torch.randint(low, high, (batch, chunks), generator=generator, device=generator.device)


def per_frame(value_Bc: torch.Tensor, chunk_frames: int) -> torch.Tensor:
    """[B, c] -> [B, F]: each chunk's value for every one of its frames."""
    return value_Bc.repeat_interleave(chunk_frames, dim=1)


def mix(clean_BFCHW: torch.Tensor, noise_BFCHW: torch.Tensor, sigma_BF: torch.Tensor) -> torch.Tensor:
    """(1 - sigma) clean + sigma noise, computed in float32 and returned in it."""
    sigma = sigma_BF.float()[..., None, None, None]
    return (1 - sigma) * clean_BFCHW.float() + sigma * noise_BFCHW.float()


def flow_target(
    clean_BFCHW: torch.Tensor, noise_BFCHW: torch.Tensor, index_Bc: torch.Tensor, table: TrainTable, mask_BF: torch.Tensor | None = None
) -> FlowTarget:
    """Noises every chunk to the level that `index_Bc` names in `table`. `mask_BF` None: every frame counts."""
    index_BF = per_frame(index_Bc, clean_BFCHW.shape[1] // index_Bc.shape[1])
    sigma = table.sigmas.to(clean_BFCHW.device)[index_BF]
    told = table.timesteps.to(clean_BFCHW.device)[index_BF].double() / 1000  # the timestep that float32 can write, to the last bit
    weight = table.weights.to(clean_BFCHW.device)[index_BF].float()
    target = noise_BFCHW.float() - clean_BFCHW.float()
    return FlowTarget(mix(clean_BFCHW, noise_BFCHW, sigma), target, told, weight, torch.ones_like(weight) if mask_BF is None else mask_BF.float())


def know_first_frames(flow: FlowTarget, clean_BFCHW: torch.Tensor, known_B: torch.Tensor) -> FlowTarget:
    """Image to video (spec training §3.5): the first `known_B[b]` frames of sample b are given clean at level 0 and do not count."""
    known_BF = torch.arange(clean_BFCHW.shape[1], device=clean_BFCHW.device)[None] < known_B[:, None]
    wide = known_BF[..., None, None, None]
    return replace(
        flow,
        noisy_BFCHW=torch.where(wide, clean_BFCHW.float(), flow.noisy_BFCHW),
        target_BFCHW=flow.target_BFCHW.masked_fill(wide, 0.0),
        sigma_BF=flow.sigma_BF.masked_fill(known_BF, 0.0),
        mask_BF=flow.mask_BF.masked_fill(known_BF, 0.0),
    )


def frame_errors(velocity_BFCHW: torch.Tensor, target_BFCHW: torch.Tensor, area_BFHW: torch.Tensor | None = None) -> torch.Tensor:
    """Squared velocity error of each frame, float32 [B, F]: the mean over channels and pixels, or a mean weighted by `area_BFHW`.

    An area weight is divided by its own mean over the batch, so that it moves weight between pixels without changing the loss's scale.
    """
    error_BFHW = (velocity_BFCHW.float() - target_BFCHW).square().mean(2)
    if area_BFHW is not None:
        error_BFHW = error_BFHW * (area_BFHW / area_BFHW.mean())
    return error_BFHW.mean((2, 3))


def masked_mean(error_BF: torch.Tensor, weight_BF: torch.Tensor, mask_BF: torch.Tensor) -> torch.Tensor:
    """sum(error weight mask) / sum(mask): the loss (spec training §3.4)."""
    return (error_BF * weight_BF * mask_BF).sum() / mask_BF.sum().clamp(min=1)


def quarter_losses(error_BF: torch.Tensor, sigma_BF: torch.Tensor, mask_BF: torch.Tensor) -> torch.Tensor:
    """Unweighted error by quarter of sigma ([0, .25), ..., [.75, 1]), float32 [4]; NaN where a quarter holds no frame."""
    errors, frames = quarter_sums(error_BF, sigma_BF, mask_BF)
    return errors / frames


def quarter_sums(error_BF: torch.Tensor, sigma_BF: torch.Tensor, mask_BF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the errors and number of frames of each quarter of sigma, [4] each."""
    quarter = (sigma_BF * 4).long().clamp(0, 3)
    member = torch.nn.functional.one_hot(quarter, 4).float() * mask_BF[..., None]
    return (error_BF[..., None] * member).sum((0, 1)), member.sum((0, 1))


def augmentation_range(max_timestep: int, shift: float) -> tuple[int, int]:
    """Half-open range of table indices whose timestep is at most `max_timestep` (0..1000), for noise on the clean history.

    The published implementation takes indices [0, max), which are the *noisiest* levels; the key's name says what is meant.
    """
    timesteps = train_table(shift).timesteps
    return int((timesteps > max_timestep).sum()), len(timesteps)
