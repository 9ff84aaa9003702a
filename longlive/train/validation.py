"""The loss on held-out clips, by noise level: the same clips, noise and levels at every step, so that the numbers of a run compare.

A clip is shown four times, once per quarter of sigma; every chunk draws its level uniformly from the entries of the training table in that quarter. So the
error of a quarter estimates what the training column of the same name does, and their mean by the number of entries, weighted as in training, the loss.

Legend: F latent frames, c chunks, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..core.geometry import Geometry
from ..core.log import warn_once
from ..data.encoding import encode_frames
from ..data.open import open_manifest, sample_size, sampling_rules
from ..data.samples import Broken
from ..data.sources import VideoSource
from ..diffusion.flow import train_table
from ..models.codec import VideoCodec
from ..models.text import TextEncoder
from ..models.wan_dit import WanDiT
from ..world.story import sample_story
from .objective import flow_target, frame_errors, know_first_frames
from .teacher_forcing import Film, frame_positions, teacher_forced_velocity
from .trainer import seed_of
from .view import training_view, visible_chunks
from .world_latents import encode_story

if TYPE_CHECKING:
    from ..config.root import Config

QUARTERS, CLIPS, SEED = 4, 8, 0


@dataclass(frozen=True, kw_only=True)
class HeldOutClip:
    """One clip on the CPU: latents_FCHW float32, prompt and cut flag per chunk, and how many of its frames are not padding."""

    number: int
    latents_FCHW: torch.Tensor
    prompts: tuple[str, ...]
    cuts: tuple[bool, ...]
    valid: int


class WorldHeldOut:
    """Stories of combinations and wordings that training never shows, as long and as varied as those of the run."""

    def __init__(self, config: "Config"):
        self.config = config

    def __len__(self) -> int:
        return CLIPS

    def clip(self, number: int, codec: VideoCodec) -> HeldOutClip:
        world, latent = self.config.world, self.config.data.image_or_video_shape
        story = sample_story(
            seed_of(SEED, number) % (1 << 40),
            chunks=world.chunks,
            shots=(world.min_shots, world.max_shots),
            characters=(1, world.max_characters),
            split="held-out",
            memory=world.memory,
            away=world.away,
        )
        made = encode_story(story, codec, Geometry.of_latent(latent[3], latent[4]), self.config.data.scene_cut_prefix)
        z = made.latents_FCHW.float().cpu()
        return HeldOutClip(number=number, latents_FCHW=z, prompts=made.prompts, cuts=made.cuts, valid=len(z))


class VideoHeldOut:
    """The first clips of a folder of videos, each from its first frame."""

    def __init__(self, config: "Config", root: Path):
        rules = sampling_rules(config, deterministic=True)
        self.source = VideoSource(open_manifest(config, root), rules, sample_size(config), seed=SEED, max_broken=config.data.max_broken_clips)

        self._name(self.source.unreadable)

    def _name(self, broken: Sequence[Broken]) -> None:
        for clip in broken:
            warn_once(f"broken held-out clip {clip.file} ({clip.reason}); val_loss is over the clips that can be read: compare it only where they are the same")

    def __len__(self) -> int:
        return min(CLIPS, len(self.source))

    def clip(self, number: int, codec: VideoCodec) -> HeldOutClip | None:
        """None where the clip, and all that could stand in for it, cannot be read."""
        fetched = self.source.fetch(number)
        self._name(fetched.broken)
        if fetched.sample is None:
            return None
        sample = fetched.sample
        z = encode_frames(codec, sample.frames_THW3[None])[0].float().cpu()
        valid = sample.valid_chunks * (len(z) // len(sample.cuts))
        return HeldOutClip(number=number, latents_FCHW=z, prompts=sample.prompts, cuts=sample.cuts, valid=valid)


def held_out(config: "Config", world: bool) -> WorldHeldOut | VideoHeldOut | None:
    """Clips that training does not see: of the world, or of `data.eval_data_path` where that is a folder of videos; else None."""
    if world:
        return WorldHeldOut(config)
    path = config.data.eval_data_path
    other = path is not None and path != config.data.data_path  # the key's default is the training data
    return VideoHeldOut(config, Path(path)) if other and (Path(path) / "video").is_dir() else None


class ValidationLoss:
    """`sums` of any part of the clips add up over ranks; `columns` makes numbers of the total."""

    def __init__(self, config: "Config", device: torch.device):
        self.config, self.device, self.rollout = config, device, training_view(config)
        table = train_table(config.model_kwargs.timestep_shift)
        self.table = type(table)(table.sigmas, table.timesteps, table.weights.clamp(min=config.training.min_loss_weight))
        quarter = (table.sigmas * QUARTERS).long().clamp(0, QUARTERS - 1)
        self.entries = [(quarter == q).nonzero().flatten() for q in range(QUARTERS)]

    @torch.no_grad()
    def sums(self, dit: WanDiT, encoder: TextEncoder, clips: Sequence[HeldOutClip]) -> torch.Tensor:
        """float64 [4, 3] on the CPU: per quarter the sum of errors, of weighted errors, and the frames counted."""
        total = torch.zeros(QUARTERS, 3, dtype=torch.float64)
        for clip in clips:
            clean = clip.latents_FCHW[None].to(self.device)
            mask = (torch.arange(clean.shape[1]) < clip.valid).float()[None].to(self.device)
            text, film = dit.text(encoder.encode(list(clip.prompts))), self._film(clip)
            told = torch.zeros(clean.shape[:2], dtype=torch.float64, device=self.device)
            for quarter, entries in enumerate(self.entries):
                generator = torch.Generator().manual_seed(seed_of(SEED, clip.number, quarter))
                noise = torch.randn(clean.shape, generator=generator).to(self.device)
                index = entries[torch.randint(len(entries), (1, len(clip.cuts)), generator=generator)]
                flow = flow_target(clean, noise, index.to(self.device), self.table, mask)
                if self.config.algorithm.i2v and self.config.training.i2v_prob == 1:
                    flow = know_first_frames(flow, clean, torch.ones(1, dtype=torch.int64, device=self.device))
                (velocity,) = teacher_forced_velocity(dit, text, film, (clean, told), [(flow.noisy_BFCHW, flow.sigma_BF)])
                error, mask_BF = frame_errors(velocity, flow.target_BFCHW).double(), flow.mask_BF.double()
                found = ((error * mask_BF).sum(), (error * flow.weight_BF * mask_BF).sum(), mask_BF.sum())
                total[quarter] += torch.stack(found).cpu()
        return total

    def _film(self, clip: HeldOutClip) -> Film:
        """Seen and placed as in training, without gaps."""
        s, rollout, cuts = self.config.training, self.rollout, [clip.cuts]
        position = frame_positions(cuts, self.config.chunk_frames, rollout.shot_offset if s.shot_offset else 0.0)
        visible, committed = visible_chunks(self.config, rollout, cuts)
        prompt = torch.arange(len(clip.cuts))[None].to(self.device)
        return Film(prompt, position.to(self.device), visible, committed, rollout.t_scale, rollout.relative)

    def columns(self, total: torch.Tensor) -> dict[str, float]:
        """val_loss, weighted as in training, and val_loss_0 to val_loss_3, the error in each quarter of sigma; of the sums of all clips."""
        errors, weighted, frames = total.unbind(1)
        share = torch.tensor([len(entries) for entries in self.entries], dtype=torch.float64) / len(self.table.sigmas)
        columns = {"val_loss": float((share * weighted / frames).sum())}
        return columns | {f"val_loss_{q}": float(value) for q, value in enumerate(errors / frames)}
