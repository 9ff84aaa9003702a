"""The VAE trainer: crops and clips of the procedural world in, a `WanVAE` and its latent statistics out.

The run is a list of stages (crop size, frames, batch, part of the run). Crops on characters come first, whole frames later, long clips last:
small things are learned where they are large in the batch, and drift over a stream only shows in streams.

Legend: B batch, T pixel frames, F latent frames, C latent channels, K statistics rows, N stories, P frame parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Iterator

import torch
from torch import nn

from ..config.root import Config
from ..core.geometry import Geometry
from ..core.log import logger
from ..models.spec import VAEDims
from ..models.wan_vae import WanVAE, norm_silu
from ..parallel.mesh import Mesh
from .compiled import channels_last, compiled_pointwise
from .export import save_vae
from .start import load_vae
from .trainer import Draw, seed_of
from .vae_objective import VAELossWeights, kl_mean, reconstruction_loss, sample_posterior
from .vae_report import fidelity, latent_statistics
from .world_windows import Pixels, Stage, draw_windows, story_parameters

FIRST_LOGVAR = -6.0
HELD_OUT_CLIPS = {"cuda": 16, "cpu": 2}
HELD_OUT_FRAMES = 125
STATISTICS_CLIPS = {"cuda": 96, "cpu": 4}


def initial_vae(dims: VAEDims, seed: int, pointwise: Callable = norm_silu) -> WanVAE:
    """A fresh VAE whose posterior starts narrow: at log-variance 0 the noise would drown the mean for a long time."""
    torch.manual_seed(seed)
    vae = WanVAE(dims, pointwise=pointwise)
    with torch.no_grad():
        vae.conv1.weight[dims.z_dim :].mul_(0.1)
        vae.conv1.bias[dims.z_dim :].fill_(FIRST_LOGVAR)
    return vae


class VAETask:
    """Trains a WanVAE on rendered stories. Satisfies `trainer.Task`."""

    name = "vae"

    def __init__(self, config: Config, device: torch.device, mesh: Mesh):
        settings, world = config.vae, config.world
        latent = config.data.image_or_video_shape
        self.geometry = Geometry.of_latent(latent[3], latent[4])
        self.device, self.mesh, self.seed = device, mesh, config.logging.seed
        self.dims = VAEDims(encoder_base=settings.encoder_base, decoder_base=settings.decoder_base)
        self.weights = VAELossWeights(mse=settings.mse_weight, edge=settings.edge_weight, kl=settings.kl_weight, mask=settings.mask_weight)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.infra.mixed_precision and device.type == "cuda")
        vae = initial_vae(self.dims, self.seed, compiled_pointwise() if config.training.compile else norm_silu)
        if config.checkpoints.vae_ckpt is not None:
            load_vae(vae, config.checkpoints.vae_ckpt)
        self.module: nn.Module = vae.to(device)
        if device.type == "cuda":
            channels_last(self.module)
        self.stages = [Stage(**stage.model_dump()) for stage in settings.stages] or [
            Stage(height=self.geometry.height, width=self.geometry.width, frames=17, batch=config.training.batch_size, fraction=1.0, character_crops=0.0)
        ]
        self.stories = {"chunks": world.chunks, "shots": (world.min_shots, world.max_shots), "characters": (1, world.max_characters)}
        first = seed_of(world.seed, mesh.dp_rank) % (1 << 40)
        self.params_NTP = story_parameters(range(first, first + world.clips), split=world.split, **self.stories).to(device)

    def _stage(self, progress: float) -> int:
        end = 0.0
        for number, stage in enumerate(self.stages):
            end += stage.fraction
            if progress < end:
                return number
        return len(self.stages) - 1

    def _batch(self, stage: Stage, draw: Draw) -> tuple[Pixels, torch.Generator]:
        return draw_windows(self.params_NTP, stage, draw, self.geometry.height, self.geometry.width), draw.generator

    def warm_up(self) -> Iterator[tuple[Pixels, torch.Generator]]:
        """One batch of every stage, the longest clips first."""
        for stage in reversed(self.stages):
            yield self._batch(stage, Draw(torch.Generator(self.device).manual_seed(0), torch.Generator().manual_seed(0), 0.0))

    def batch(self, draw: Draw) -> tuple[Pixels, torch.Generator]:
        return self._batch(self.stages[self._stage(draw.progress)], draw)

    def loss(self, batch: tuple[Pixels, torch.Generator]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pixels, generator = batch
        video = pixels.video
        with self.autocast:
            mu, logvar, _ = self.module.encode(video, keep=False)
            output, _ = self.module.decode(sample_posterior(mu, logvar, generator), keep=False)
        kl = kl_mean(mu, logvar)
        loss = reconstruction_loss(output, video, pixels.mask, self.weights) + self.weights.kl * kl
        with torch.no_grad():
            mse = (output.float() - video).square().mean()
            mean, mse, kl = (self.mesh.sum(torch.stack((loss, mse, kl))) / self.mesh.size).unbind()
        return loss - loss.detach() + mean, {"psnr": 10 * torch.log10(4 / mse), "kl": kl}

    def _clips(self, split: str, count: int, frames: int) -> Iterator[torch.Tensor]:
        """Frame parameters [1, T, P] of the first `frames` frames of stories that no training step sees."""
        shape = self.stories | {"chunks": -(-(frames + 3) // 32)}
        for number in range(count):
            params = story_parameters([seed_of(self.seed, 1 << 20, number) % (1 << 40)], split=split, **shape)
            yield params[:, :frames].to(self.device)

    @torch.no_grad()
    def export(self, folder: Path, step: int, ema: dict[str, torch.Tensor], statistics_clips: int = 4) -> None:
        # clips as long as training saw: their convolutions are tuned already
        clips = self._clips("train", statistics_clips, max(stage.frames for stage in self.stages))
        with self.autocast:
            mean_KC, std_KC = latent_statistics(self.module, clips, self.geometry)
        save_vae(folder, self.module, mean_KC, std_KC, {"trainer": self.name, "step": str(step), "seed": str(self.seed)})

    @torch.no_grad()
    def finish(self, folder: Path) -> dict[str, float]:
        """Final statistics over many clips, and fidelity on held-out multi-shot clips."""
        self.export(folder, -1, {}, STATISTICS_CLIPS[self.device.type])
        count = HELD_OUT_CLIPS[self.device.type]
        torch.backends.cudnn.benchmark = False  # tuning would take longer than these few clips
        with self.autocast:
            whole, inside, late = fidelity(self.module, self._clips("held-out", count, HELD_OUT_FRAMES), self.geometry)
        results = {"psnr": whole, "psnr_characters": inside, "psnr_last_frames": late, "clips": count}
        logger.info("held-out: %s", ", ".join(f"{k} {v:.2f}" for k, v in results.items()))
        return results
