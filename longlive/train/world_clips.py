"""The procedural world as a source of clips: a bank of rendered and encoded stories in device memory, drawn from at random."""

from __future__ import annotations

import time

import torch

from ..config.root import Config
from ..core.geometry import Geometry
from ..core.log import logger
from ..data.latents import LatentBank
from ..models.spec import DiTDims, model_spec
from ..models.text import text_encoder
from ..parallel.mesh import Mesh
from .clips import Clips, FrozenParts, PaddedText, Words
from .start import codec_for_training
from .trainer import Draw
from .world_latents import PromptBank, StorySource, WorldBank

REPORT_SECONDS = 10.0


class WorldClips:
    """Satisfies `clips.ClipSource`. What the bank holds follows from the step number, so that there is no state to keep."""

    def __init__(self, config: Config, device: torch.device, mesh: Mesh):
        self.config, self.device, self.stream = config, device, mesh.dp_rank
        self.frames = config.world.chunks * config.chunk_frames
        self.title = f"the procedural world, {config.world.clips} stories (seed {config.world.seed})"

    def load(self, dims: DiTDims) -> None:
        config, world, latent = self.config, self.config.world, self.config.data.image_or_video_shape
        dtype = torch.bfloat16 if config.infra.mixed_precision and self.device.type == "cuda" else torch.float32
        codec = codec_for_training(config, self.device, dtype)
        text = PaddedText(dims, text_encoder(model_spec(config.model_kwargs.model_name)), dtype, self.device)
        source = StorySource.configured(world, self.stream, world.chunks)
        self.bank = WorldBank(
            LatentBank(world.clips, self.frames, *latent[2:], self.device),
            PromptBank(world.clips * world.wordings, world.chunks, text),
            source,
            codec,
            Geometry.of_latent(latent[3], latent[4]),
            config.data.scene_cut_prefix,
        )

    def frozen_parts(self) -> FrozenParts:
        return FrozenParts(self.bank.codec, self.bank.prompts.text.encoder, umt5=False)

    def prepare(self) -> None:
        """Fills the bank."""
        start = shown = time.perf_counter()
        slots = len(self.bank.clips)
        for made in range(1, slots + 1):
            self.bank.fill(made)
            if time.perf_counter() - shown > REPORT_SECONDS or made == slots:
                shown = time.perf_counter()
                logger.info("encoded %d of %d clips, %.1f clips/s", made, slots, made / (shown - start))

    def example(self, number: int) -> Clips:
        return self._draw(torch.Generator().manual_seed(number))

    def draw(self, draw: Draw) -> Clips:
        self.bank.fill(len(self.bank.clips) + self.config.world.refresh * draw.step)
        return self._draw(draw.host)

    def _draw(self, generator: torch.Generator) -> Clips:
        found = self.bank.clips.draw(self.config.training.batch_size, generator)
        whole_BF = torch.ones(found.latents_BFCHW.shape[:2], device=self.device)
        return Clips(latents_BFCHW=found.latents_BFCHW, mask_BF=whole_BF, cuts=found.cuts, area_BFHW=found.area_BFHW, slot_B=found.slot_B)

    def words(self, clips: Clips, dropped_B: torch.Tensor, draw: Draw) -> Words:
        return self.bank.prompts.words(self.bank.text_rows(clips.slot_B, draw.host), dropped_B)

    def state(self) -> dict:
        return {}

    def restore(self, state: dict) -> None:
        pass
