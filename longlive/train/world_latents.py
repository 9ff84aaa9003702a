"""The latent bank of the procedural world: stories rendered, encoded by a frozen VAE, and kept with their prompts' embeddings.

Story number n of a rank is a function of (world seed, rank, n). After `made` stories slot s holds the newest story n with n mod slots = s, so the
content of the bank at any step follows from the step number.

Legend: T pixel frames, F latent frames, c chunks, N slots, M text keys, t text features, H W latent rows and columns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..core.geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE, Geometry
from ..core.story import SCENE_CUT_PREFIX, plan
from ..data.latents import LatentBank, LatentClip
from ..models.codec import VideoCodec
from ..models.text import TextEncoder
from ..models.wan_dit import TextContext, WanDiT
from ..world.render import frame_parameters, render_masked
from ..world.story import WorldStory, reworded, sample_story
from .trainer import seed_of


def latent_area(mask_T1HW: torch.Tensor) -> torch.Tensor:
    """Pixel mask -> [F, H/16, W/16]: the most that a latent pixel shows of a character in any pixel it encodes."""
    small = F.max_pool2d(mask_T1HW, SPATIAL_STRIDE)[:, 0]
    later = small[1:].unflatten(0, (-1, TEMPORAL_STRIDE)).amax(1)
    return torch.cat([small[:1], later])


def encode_story(story: WorldStory, codec: VideoCodec, geometry: Geometry, prefix: str = SCENE_CUT_PREFIX) -> LatentClip:
    """Renders and encodes one story as one stream."""
    params = frame_parameters(story, None).to(codec.device)
    pixels, mask = render_masked(params, geometry.height, geometry.width)
    latents = codec.encode(pixels.transpose(0, 1)[None])[0]
    return LatentClip(latents, latent_area(mask), story_prompts(story, prefix), tuple(story.cuts))


def story_prompts(story: WorldStory, prefix: str) -> tuple[str, ...]:
    """What generation would be fed, per chunk."""
    return tuple(p.prompt for p in plan(story.storyboard(), prefix=prefix))


class PromptBank:
    """Texts, one per chunk and row, padded once to a width that never changes: raw_NcMt and bias_NcM, as `WanDiT.text` lays them out."""

    def __init__(self, rows: int, chunks: int, dit: WanDiT, encoder: TextEncoder, dtype: torch.dtype):
        self.dit, self.encoder, device = dit, encoder, dit.patch_embedding.weight.device
        self.width = math.ceil((dit.dims.text_len + 2) / 8) * 8
        self.raw = torch.zeros(rows, chunks, self.width, dit.dims.text_dim, dtype=dtype, device=device)
        self.bias = torch.zeros(rows, chunks, self.width, device=device)
        self.empty_M = self._rows([""])[1][0]

    @torch.no_grad()
    def _rows(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """raw [R, M, t] and bias [R, M]; a longest possible row is added and dropped again, so that the layout is always the same."""
        longest = torch.zeros(self.dit.dims.text_len, self.dit.dims.text_dim)
        context = self.dit.text([*self.encoder.encode(prompts), longest])
        more = self.width - context.bias_RM.shape[1]
        return F.pad(context.raw_RMt, (0, 0, 0, more))[:-1], F.pad(context.bias_RM, (0, more), value=-math.inf)[:-1]

    def put(self, row: int, prompts: tuple[str, ...]) -> None:
        raw, bias = self._rows(list(prompts))
        self.raw[row], self.bias[row] = raw.to(self.raw.dtype), bias

    def context(self, row_B: torch.Tensor, dropped_B: torch.Tensor) -> TextContext:
        """The texts of sample after sample, chunk by chunk; samples in `dropped_B` read the empty prompt. Made with gradients."""
        raw = self.raw[row_B].masked_fill(dropped_B[:, None, None, None], 0).flatten(0, 1).to(self.dit.patch_embedding.weight.dtype)
        bias = torch.where(dropped_B[:, None, None], self.empty_M, self.bias[row_B]).flatten(0, 1)
        return TextContext(raw, self.dit.text_embedding(raw), bias, self.dit.text_stamp())


class StorySource:
    """Makes stories by number, each in `wordings` wordings. `story`: what `sample_story` takes beside a seed."""

    def __init__(self, *, seed: int, rank: int, wordings: int = 1, **story):
        self.seed, self.rank, self.wordings, self.story = seed, rank, wordings, story

    def __getitem__(self, number: int) -> WorldStory:
        return sample_story(seed_of(self.seed, self.rank, number) % (1 << 40), **self.story)

    def told(self, story: WorldStory) -> list[WorldStory]:
        """The story in all its wordings, itself first."""
        return [story, *(reworded(story, n, self.story.get("memory", 0.0)) for n in range(1, self.wordings))]


class WorldBank:
    """A LatentBank and a PromptBank that are filled from a StorySource; wording w of slot s is text row s * wordings + w.

    With one wording only, a network learns by heart which film belongs to which sentence.
    """

    def __init__(self, clips: LatentBank, prompts: PromptBank, source: StorySource, codec: VideoCodec, geometry: Geometry, prefix: str):
        self.clips, self.prompts, self.source, self.codec, self.geometry, self.prefix = clips, prompts, source, codec, geometry, prefix
        self.made = 0

    @torch.no_grad()
    def fill(self, made: int) -> None:
        """Brings the bank to its content after `made` stories (at least one per slot)."""
        for number in range(max(self.made, made - len(self.clips)), made):
            story, slot = self.source[number], number % len(self.clips)
            self.clips.put(slot, encode_story(story, self.codec, self.geometry, self.prefix))
            for wording, told in enumerate(self.source.told(story)):
                self.prompts.put(slot * self.source.wordings + wording, story_prompts(told, self.prefix))
        self.made = max(self.made, made)

    def text_rows(self, slot_B: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A random text row for each slot, drawn by a CPU generator."""
        wording_B = torch.randint(self.source.wordings, (len(slot_B),), generator=generator)
        return slot_B * self.source.wordings + wording_B.to(slot_B.device, non_blocking=True)
