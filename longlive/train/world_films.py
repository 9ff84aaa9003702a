"""Stories of the procedural world as films to distil on: only their words and cuts, and the first picture where one is given.

Distillation needs no video. The prompts of `world.clips` stories, in `world.wordings` wordings each, are kept on the device and drawn at random.

Legend: B batch, N stories, c chunks, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

import time

import torch

from ..config.root import Config
from ..core.geometry import Geometry
from ..core.log import logger
from ..models.spec import DiTDims, ModelSpec
from ..models.text import text_encoder
from ..parallel.mesh import Mesh
from ..world.render import frame_parameters, render_masked
from .clips import PaddedText, Words
from .films import Films, film_dtype, film_frames
from .start import codec_for_training
from .trainer import Draw
from .world_latents import PromptBank, StorySource, story_prompts


class WorldFilms:
    """Satisfies `films.FilmSource`. What it knows follows from the configuration, so that there is no state to keep."""

    def __init__(self, config: Config, spec: ModelSpec, device: torch.device, mesh: Mesh):
        self.config, self.spec, self.device = config, spec, device
        world, self.frames = config.world, film_frames(config)
        self.chunks = self.frames // config.chunk_frames
        self.title = f"{world.clips} stories of the procedural world (seed {world.seed})"
        self.source = StorySource.configured(world, mesh.dp_rank, self.chunks)

    def load(self, dims: DiTDims) -> None:
        dtype = film_dtype(self.config, self.device)
        self.text = PaddedText(dims, text_encoder(self.spec), dtype, self.device)
        self.codec = codec_for_training(self.config, self.device, dtype) if self.config.algorithm.i2v else None

    def prepare(self) -> None:
        world, began = self.config.world, time.perf_counter()
        self.bank = PromptBank(world.clips * world.wordings, self.chunks, self.text)
        self.cuts, firsts = [], []
        for slot in range(world.clips):
            story = self.source[slot]
            self.cuts.append(tuple(story.cuts))
            for wording, told in enumerate(self.source.told(story)):
                self.bank.put(slot * world.wordings + wording, story_prompts(told, self.config.data.scene_cut_prefix))
            if self.codec is not None:
                firsts.append(self._first(story))
        self.first_N1CHW = torch.cat(firsts) if firsts else None
        logger.info("told %d stories in %d wordings, %.1f s", world.clips, world.wordings, time.perf_counter() - began)

    @torch.no_grad()
    def _first(self, story) -> torch.Tensor:
        size = Geometry.of_latent(*self.config.data.image_or_video_shape[3:])
        pixels, _ = render_masked(frame_parameters(story, None)[:1].to(self.device), size.height, size.width)
        return self.codec.encode(pixels.transpose(0, 1)[None]).float()

    def example(self, number: int, chunks: int) -> Films:
        return self._draw(torch.Generator().manual_seed(number), chunks)

    def draw(self, draw: Draw, chunks: int) -> Films:
        return self._draw(draw.host, chunks)

    def _draw(self, generator: torch.Generator, chunks: int) -> Films:
        world, batch = self.config.world, self.config.training.batch_size
        slots = torch.randint(world.clips, (batch,), generator=generator)
        rows_B = (slots * world.wordings + torch.randint(world.wordings, (batch,), generator=generator)).to(self.device, non_blocking=True)
        words = Words(*(part[rows_B, :chunks].flatten(0, 1) for part in (self.bank.raw, self.bank.bias)))
        first = None if self.first_N1CHW is None else self.first_N1CHW[slots.to(self.device, non_blocking=True)]
        return Films(cuts=tuple(self.cuts[slot][:chunks] for slot in slots.tolist()), words=words, first_B1CHW=first)

    def state(self) -> dict:
        return {}

    def restore(self, state: dict) -> None:
        pass
