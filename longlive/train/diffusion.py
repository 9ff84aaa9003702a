"""The autoregressive diffusion trainer: teacher forcing on latent clips, wherever they come from (`clips.ClipSource`).

A step shows clips as [clean; noisy copies] and asks each noisy chunk for its velocity, given the clean chunks that generation would still have
in its window (`training.visibility: window`) at the distances they would have there (shot offsets, and gaps that stand for a long film).

Legend: B batch, F latent frames, c chunks, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Iterator

import torch
from torch import nn

from ..config.root import Config
from ..core.log import logger
from ..diffusion.flow import TrainTable, train_table
from ..models.spec import ModelSpec, model_spec
from ..models.wan_dit import WanDiT
from ..ops.merged_attention import part_kernel
from ..parallel.apply import Plan, apply
from ..parallel.mesh import Mesh, check_heads
from .clips import Clips, ClipSource, Words, open_clips
from .compiled import checkpoint_blocks, compile_blocks
from .evaluate import Evaluator
from .export import save_generator
from .film_step import FilmStep
from .guards import device_memory
from .low_precision import GENERATOR, low_precision
from .memory import TrainingMemory, training_memory
from .objective import FlowTarget, augmentation_range, draw_indices, flow_target, know_first_frames, mix, per_frame
from .recycling import LATENT, Perturbed, merged_states, recycler, whole_velocities
from .sharded import film_layout
from .start import starting_generator
from .teacher_forcing import Film, draw_gaps, frame_positions
from .trainer import Draw
from .view import training_view, visible_chunks

QUARTERS = ("loss_0", "loss_1", "loss_2", "loss_3")


@dataclass(frozen=True)
class DiffusionBatch:
    """Everything one forward needs: words, film layout, (context, sigma), noisy copies, loss area; and what was disturbed in it at which step."""

    step: int
    words: Words
    film: Film
    context: tuple[torch.Tensor, torch.Tensor]
    copies: tuple[FlowTarget, ...]
    area_BFHW: torch.Tensor | None
    index_Bc: tuple[torch.Tensor, ...]
    disturbed: Perturbed | None = None


class DiffusionTask:
    """Trains a WanDiT by teacher forcing. Satisfies `trainer.Task`. Data are opened before weights are read. `logdir` gets films, where they are asked for."""

    name = "diffusion"

    def __init__(self, config: Config, device: torch.device, mesh: Mesh, logdir: Path | None = None):
        spec = model_spec(config.model_kwargs.model_name)
        self.config, self.settings, self.device, self.mesh = config, config.training, device, mesh
        self.rollout = training_view(config)
        table = train_table(config.model_kwargs.timestep_shift)
        weights = table.weights.clamp(min=config.training.min_loss_weight)
        self.table = TrainTable(table.sigmas.to(device), table.timesteps.to(device), weights.to(device))
        self.mixed = config.infra.mixed_precision and device.type == "cuda"
        self.clips: ClipSource = open_clips(config, spec, device, mesh)
        module, self.origin = starting_generator(config, spec, device)
        self.low = low_precision(config, GENERATOR, module, spec, mesh, frozen=config.adapter is not None)
        self._adapt(module, spec)
        check_heads(module.dims.heads, mesh.sp_size)
        self.module: nn.Module = module
        self.clips.load(module.dims)
        self.memory = self._memory(module)
        layout = film_layout(self.clips.frames, self.settings.noisy_copies, mesh)
        self.step = FilmStep(mesh, layout, self.settings.compile, self.memory.kept)
        self.recycler = recycler(config, self.clips.frames // config.chunk_frames, mesh, device)
        self.evaluator = self._evaluator(spec, logdir) if logdir is not None and config.evaluation.interval > 0 else None
        plan = Plan(
            blocks=spec.block_patterns,
            entries=spec.entry_patterns,
            strategy=config.infra.sharding_strategy,
            wrap=config.infra.generator_fsdp_wrap_strategy,
            bf16=self.mixed,
            recompute=partial(checkpoint_blocks, keep=config.infra.keep_blocks) if config.infra.gradient_checkpointing else None,
            compile=compile_blocks if self.settings.compile else None,
        )
        apply(self.module, device, plan)

    def _adapt(self, module: WanDiT, spec: ModelSpec) -> None:
        """Chooses what of the network learns: everything."""

    def _memory(self, module: WanDiT) -> TrainingMemory:
        """The estimate for this process. Attention over the whole history at absolute positions can be kept where a kernel of the card reads it."""
        parts, parameters = self.clips.frozen_parts(), sum(p.numel() for p in module.parameters())
        sample = torch.empty(0, 0, 1, module.dims.head_dim, dtype=torch.bfloat16 if self.mixed else torch.float32, device=self.device)
        keeps = part_kernel(sample) is not None and self.settings.visibility == "all"
        if not keeps and self.config.infra.keep_attention not in ("auto", 0):
            logger.warning("infra.keep_attention does nothing here: it needs a GPU in bfloat16 and training.visibility: all")
        return training_memory(
            self.config, module.dims, parameters, None if parts.codec is None else parts.codec.vae.dims,
            umt5=parts.umt5, frames=self.clips.frames, world=self.mesh.size, mixed=self.mixed, card=device_memory(self.device) if keeps else None,
        )  # fmt: skip

    def _evaluator(self, spec: ModelSpec, logdir: Path) -> Evaluator:
        """It uses the frozen networks of the run where they are large, and as generation has them."""
        parts, lent = self.clips.frozen_parts(), spec.folder and not self.settings.compile
        own = {"codec": parts.codec, "text_encoder": parts.text} if lent else {}
        evaluator = Evaluator(self.config, logdir, self.device, self.mesh, **own)
        evaluator.check()
        return evaluator

    def warm_up(self) -> Iterator[DiffusionBatch]:
        """Whatever the data need first, then two batches: the first compiles, the second shows that nothing compiles again."""
        self.clips.prepare()
        for number in range(2):
            draw = Draw(torch.Generator(self.device).manual_seed(number), torch.Generator().manual_seed(number), 0.0)
            yield self._batch(self.clips.example(number), draw)

    def batch(self, draw: Draw) -> DiffusionBatch:
        clips = self.clips.draw(draw)
        batch = self._batch(clips, draw)
        if self.recycler is None:
            return batch
        context, told = batch.context
        shown = self.recycler.perturb(batch.step, draw.host, clips.latents_BFCHW, batch.copies, batch.index_Bc, context)
        return replace(batch, copies=shown.flows, context=(shown.context_BFCHW, told), disturbed=shown)

    def _batch(self, clips: Clips, draw: Draw) -> DiffusionBatch:
        if self.low is not None:
            self.low.begin(draw)
        film, mask_BF = self._film(clips, draw)
        copies, indices, known = [], [], torch.zeros(len(clips.cuts), dtype=torch.bool, device=self.device)
        noises = [_normal(clips.latents_BFCHW, draw.generator) for _ in range(self.settings.noisy_copies)]
        for noise in noises:
            index_Bc = draw_indices(len(clips.cuts), len(clips.cuts[0]), draw.generator)
            flow = flow_target(clips.latents_BFCHW, noise, index_Bc, self.table, mask_BF)
            if self.config.algorithm.i2v:
                given = self._chance(self.settings.i2v_prob, len(clips.cuts), draw)
                flow, known = know_first_frames(flow, clips.latents_BFCHW, given.long()), known | given
            copies.append(flow)
            indices.append(index_Bc)
        area = None if self.settings.character_weight == 1 else 1 + (self.settings.character_weight - 1) * clips.area_BFHW
        dropped = self._chance(self.settings.text_dropout, len(clips.cuts), draw)
        words = self.clips.words(clips, dropped, draw)
        return DiffusionBatch(draw.step, words, film, self._context(clips, noises[0], known, draw), tuple(copies), area, tuple(indices))

    def _chance(self, probability: float, count: int, draw: Draw) -> torch.Tensor:
        return torch.rand(count, generator=draw.generator, device=self.device) < probability

    def _film(self, clips: Clips, draw: Draw) -> tuple[Film, torch.Tensor]:
        """Layout of the batch, and the loss mask [B, F], which is 0 on padding and right behind a gap."""
        s, rollout, chunk_frames = self.settings, self.rollout, self.config.chunk_frames
        batch, chunks = len(clips.cuts), len(clips.cuts[0])
        gaps = [[0] * chunks for _ in clips.cuts]
        if s.position_gap:
            pin = rollout.policy.pin
            for b, u in enumerate(torch.rand(batch, generator=draw.host).tolist()):
                if u < s.position_gap_prob:
                    gaps[b] = draw_gaps(clips.cuts[b], s.position_gap, chunk_frames, pin, draw.host)
        offset = rollout.shot_offset if s.shot_offset else 0.0
        position = frame_positions(clips.cuts, chunk_frames, offset, gaps)
        visible, committed = visible_chunks(self.config, rollout, clips.cuts)
        prompt = torch.arange(batch * chunks).reshape(batch, chunks)
        mask = per_frame(torch.tensor(gaps) == 0, chunk_frames).float()
        film = Film(self._up(prompt), self._up(position), visible, committed, rollout.t_scale, rollout.relative)
        return film, self._up(mask) * clips.mask_BF

    def _up(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _context(self, clips: Clips, noise: torch.Tensor, known_B: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
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

    def loss(self, batch: DiffusionBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        raw_RMt, bias_RM = batch.words
        with torch.autocast(self.device.type, torch.bfloat16) if self.mixed else nullcontext():
            text = self.module.text_context(raw_RMt.to(self.module.patch_embedding.weight.dtype), bias_RM)
            velocities = self.step.velocities(self.module, text, batch.film, batch.context, batch.copies)
        loss, quarters = self.step.loss(velocities, batch.copies, batch.area_BFHW)
        columns = dict(zip(QUARTERS, quarters.unbind()))
        if batch.disturbed is not None:
            answers = whole_velocities(torch.cat([v.detach() for v in velocities], dim=1), self.mesh, self.step.layout)
            columns |= self.recycler.observe(batch.step, batch.disturbed, answers)
        return loss, columns

    def state(self) -> dict:
        """Where this rank stands beside the weights: in its data, and its share of the error buffers."""
        return {"clips": self.clips.state()} | ({} if self.recycler is None else {"errors": self.recycler.state_dict()})

    def restore(self, state: dict) -> None:
        self.clips.restore(state["clips"])
        if self.recycler is not None and "errors" in state:
            self.recycler.load_state_dict(state["errors"])

    def merged(self, states: Sequence[dict]) -> dict:
        """For a run that goes on on other ranks: what all ranks of the old one kept, as a state that this rank can restore."""
        own = states[0]
        if "errors" not in own:
            return own
        shares = own["errors"][LATENT]["ranks"]
        first = self.mesh.dp_rank % (len(states) // shares) * shares
        return own | {"errors": merged_states([states[rank]["errors"] for rank in range(first, first + shares)])}

    def evaluate(self, step: int, ema: dict[str, torch.Tensor]) -> dict[str, float]:
        """Films, held-out loss and scores. Every rank must call it; only for a task with a `logdir` and `evaluation.interval`."""
        return self.evaluator.run(self.module, ema, step)

    def export(self, folder: Path, step: int, ema: dict[str, torch.Tensor]) -> None:
        metadata = {**self.origin, **(self.low.metadata() if self.low else {}), "trainer": self.name, "step": str(step), "seed": str(self.config.logging.seed)}
        save_generator(folder, dict(self.module.named_parameters()), ema, metadata)

    def finish(self, folder: Path) -> dict[str, float]:
        return {}


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)
