"""The autoregressive diffusion trainer of the small model: teacher forcing on a bank of latent clips of the procedural world.

A step shows clips as [clean; noisy copies] and asks each noisy chunk for its velocity, given the clean chunks that generation would still have
in its window (`training.visibility: window`) at the distances they would have there (shot offsets, and gaps that stand for a long film).

Legend: B batch, F latent frames, c chunks, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch
from torch import nn

from ..cache.attend import visible_tensor
from ..config.root import Config
from ..core.errors import NotAvailable
from ..core.geometry import Geometry
from ..core.log import logger
from ..data.latents import LatentBank, LatentBatch
from ..diffusion.flow import TrainTable, train_table
from ..engine.pipeline import rollout_settings
from ..models.codec import VideoCodec
from ..models.spec import ModelSpec, model_spec
from ..models.text import text_encoder
from ..models.wan_dit import TextContext, WanDiT
from ..parallel.mesh import Mesh
from .compiled import RotatedAhead, checkpoint_blocks, compile_blocks
from .export import save_generator
from .objective import (
    FlowTarget,
    augmentation_range,
    draw_indices,
    flow_target,
    frame_errors,
    know_first_frames,
    masked_mean,
    mix,
    per_frame,
    quarter_losses,
)
from .start import codec_for_training, load_generator
from .teacher_forcing import Film, draw_gaps, frame_positions, teacher_forced_velocity
from .trainer import Draw
from .world_latents import PromptBank, StorySource, WorldBank

REPORT_SECONDS = 10.0
QUARTERS = ("loss_0", "loss_1", "loss_2", "loss_3")


@dataclass(frozen=True)
class DiffusionBatch:
    """Everything one forward needs: text, film layout, (context, sigma), noisy copies, loss area."""

    text_B: torch.Tensor
    dropped_B: torch.Tensor
    film: Film
    context: tuple[torch.Tensor, torch.Tensor]
    copies: tuple[FlowTarget, ...]
    area_BFHW: torch.Tensor | None


class DiffusionTask:
    """Trains a WanDiT by teacher forcing. Satisfies `trainer.Task`."""

    name = "diffusion"

    def __init__(self, config: Config, device: torch.device, mesh: Mesh):
        spec = model_spec(config.model_kwargs.model_name)
        if spec.text_kind != "hashed-words":
            raise NotAvailable(f"training {spec.name} on video folders", "train the small model (configs/tiny/train_ar.yaml)")
        self.config, self.settings, self.device = config, config.training, device
        self.rollout = rollout_settings(config)  # the window and positions that generation will use, which training imitates
        table = train_table(config.model_kwargs.timestep_shift)
        weights = table.weights.clamp(min=config.training.min_loss_weight)
        self.table = TrainTable(table.sigmas.to(device), table.timesteps.to(device), weights.to(device))
        self.mixed = config.infra.mixed_precision and device.type == "cuda"
        torch.manual_seed(config.logging.seed)
        self.module: nn.Module = WanDiT(spec.dit)
        if config.checkpoints.generator_ckpt is not None:
            load_generator(self.module, config.checkpoints.generator_ckpt, use_ema=config.inference.use_ema)
        self.module.to(device)
        self.bank = self._bank(spec, mesh)
        if config.infra.gradient_checkpointing:
            checkpoint_blocks(self.module.blocks)
        if self.settings.compile:
            compile_blocks(self.module.blocks)

    def _bank(self, spec: ModelSpec, mesh: Mesh) -> WorldBank:
        world, latent = self.config.world, self.config.data.image_or_video_shape
        codec: VideoCodec = codec_for_training(self.config, self.device, torch.bfloat16 if self.mixed else torch.float32)
        clips = LatentBank(world.clips, world.chunks * self.config.chunk_frames, *latent[2:], self.device)
        prompts = PromptBank(world.clips * world.wordings, world.chunks, self.module, text_encoder(spec), torch.bfloat16 if self.mixed else torch.float32)
        source = StorySource(
            seed=world.seed,
            rank=mesh.dp_rank,
            wordings=world.wordings,
            chunks=world.chunks,
            shots=(world.min_shots, world.max_shots),
            characters=(1, world.max_characters),
            split=world.split,
            memory=world.memory,
            away=world.away,
        )
        return WorldBank(clips, prompts, source, codec, Geometry.of_latent(latent[3], latent[4]), self.config.data.scene_cut_prefix)

    def warm_up(self) -> Iterator[DiffusionBatch]:
        """Fills the bank, then two batches: the first compiles, the second shows that nothing compiles again."""
        start = shown = time.perf_counter()
        slots = len(self.bank.clips)
        for made in range(1, slots + 1):
            self.bank.fill(made)
            if time.perf_counter() - shown > REPORT_SECONDS or made == slots:
                shown = time.perf_counter()
                logger.info("encoded %d of %d clips, %.1f clips/s", made, slots, made / (shown - start))
        for number in range(2):
            draw = Draw(torch.Generator(self.device).manual_seed(number), torch.Generator().manual_seed(number), 0.0)
            yield self._batch(draw)

    def batch(self, draw: Draw) -> DiffusionBatch:
        self.bank.fill(len(self.bank.clips) + self.config.world.refresh * draw.step)
        return self._batch(draw)

    def _batch(self, draw: Draw) -> DiffusionBatch:
        clips = self.bank.clips.draw(self.settings.batch_size, draw.host)
        film, mask_BF = self._film(clips, draw)
        copies, known = [], torch.zeros(len(clips.cuts), dtype=torch.bool, device=self.device)
        noises = [_normal(clips.latents_BFCHW, draw.generator) for _ in range(self.settings.noisy_copies)]
        for noise in noises:
            index_Bc = draw_indices(len(clips.cuts), len(clips.cuts[0]), draw.generator)
            flow = flow_target(clips.latents_BFCHW, noise, index_Bc, self.table, mask_BF)
            if self.config.algorithm.i2v:
                given = self._chance(self.settings.i2v_prob, len(clips.cuts), draw)
                flow, known = know_first_frames(flow, clips.latents_BFCHW, given.long()), known | given
            copies.append(flow)
        area = None if self.settings.character_weight == 1 else 1 + (self.settings.character_weight - 1) * clips.area_BFHW
        dropped = self._chance(self.settings.text_dropout, len(clips.cuts), draw)
        text_B = self.bank.text_rows(clips.slot_B, draw.host)
        return DiffusionBatch(text_B, dropped, film, self._context(clips, noises[0], known, draw), tuple(copies), area)

    def _chance(self, probability: float, count: int, draw: Draw) -> torch.Tensor:
        return torch.rand(count, generator=draw.generator, device=self.device) < probability

    def _film(self, clips: LatentBatch, draw: Draw) -> tuple[Film, torch.Tensor]:
        """Layout of the batch, and the loss mask [B, F], which is 0 right behind a gap."""
        s, rollout, chunk_frames = self.settings, self.rollout, self.config.chunk_frames
        batch, chunks = len(clips.cuts), len(clips.cuts[0])
        gaps = [[0] * chunks for _ in clips.cuts]
        if s.position_gap and not rollout.relative:
            pin = rollout.policy.pin
            for b, u in enumerate(torch.rand(batch, generator=draw.host).tolist()):
                if u < s.position_gap_prob:
                    gaps[b] = draw_gaps(clips.cuts[b], s.position_gap, chunk_frames, pin, draw.host)
        offset = rollout.shot_offset if s.shot_offset else 0.0
        position = frame_positions(clips.cuts, chunk_frames, offset, gaps)
        visible = committed = None
        if s.visibility == "window":
            visible = visible_tensor(clips.cuts, rollout.policy)
            committed = visible_tensor(clips.cuts, rollout.policy, commit=True) if rollout.recache else None
        prompt = torch.arange(batch * chunks).reshape(batch, chunks)
        mask = per_frame(torch.tensor(gaps) == 0, chunk_frames).float()
        film = Film(self._up(prompt), self._up(position), visible, committed, rollout.t_scale, rollout.relative)
        return film, self._up(mask)

    def _up(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _context(self, clips: LatentBatch, noise: torch.Tensor, known_B: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """The clean copy and the level it is told. Noise that stands for the errors of a rollout is not told (level 0)."""
        s, clean = self.settings, clips.latents_BFCHW
        batch, chunks = len(clips.cuts), len(clips.cuts[0])
        told = torch.zeros(clean.shape[:2], dtype=torch.float64, device=self.device)
        if (largest := self.config.algorithm.noise_augmentation_max_timestep) > 0:
            low, high = augmentation_range(largest, self.config.model_kwargs.timestep_shift)
            index = per_frame(draw_indices(batch, chunks, draw.generator, low=low, high=high), self.config.chunk_frames)
            told = self.table.timesteps[index].double() / 1000
            context = mix(clean, noise, told)
        elif s.context_noise > 0:
            sigma_Bc = s.context_noise * torch.rand(batch, chunks, generator=draw.generator, device=self.device)
            sigma_Bc = sigma_Bc * self._chance(s.context_noise_prob, batch * chunks, draw).reshape(batch, chunks)
            context = mix(clean, _normal(clean, draw.generator), per_frame(sigma_Bc, self.config.chunk_frames))
        else:
            return clean, told
        first = torch.zeros_like(told, dtype=torch.bool)
        first[:, 0] = known_B
        return torch.where(first[..., None, None, None], clean, context), told.masked_fill(first, 0.0)

    def _text(self, batch: DiffusionBatch) -> TextContext:
        return self.bank.prompts.context(batch.text_B, batch.dropped_B)

    def loss(self, batch: DiffusionBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pairs = [(flow.noisy_BFCHW, flow.sigma_BF) for flow in batch.copies]
        wrap = RotatedAhead if self.settings.compile else _unchanged
        with torch.autocast(self.device.type, torch.bfloat16) if self.mixed else nullcontext():
            velocities = teacher_forced_velocity(self.module, self._text(batch), batch.film, batch.context, pairs, wrap)
        errors = torch.cat([frame_errors(v, flow.target_BFCHW, batch.area_BFHW) for v, flow in zip(velocities, batch.copies)])
        sigma, weight, mask = (torch.cat([part(flow) for flow in batch.copies]) for part in (_sigma, _weight, _mask))
        loss = masked_mean(errors, weight, mask)
        return loss, dict(zip(QUARTERS, quarter_losses(errors.detach(), sigma, mask).unbind()))

    def export(self, folder: Path, step: int, ema: dict[str, torch.Tensor]) -> None:
        metadata = {"trainer": self.name, "step": str(step), "seed": str(self.config.logging.seed)}
        save_generator(folder, dict(self.module.named_parameters()), ema, metadata)

    def finish(self, folder: Path) -> dict[str, float]:
        return {}


def _unchanged(attend):
    return attend


def _sigma(flow: FlowTarget) -> torch.Tensor:
    return flow.sigma_BF


def _weight(flow: FlowTarget) -> torch.Tensor:
    return flow.weight_BF


def _mask(flow: FlowTarget) -> torch.Tensor:
    return flow.mask_BF


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)
