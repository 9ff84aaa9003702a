"""The latent bank of the procedural world: stories rendered, encoded by a frozen VAE, and kept with their prompts' embeddings.

Story number n of a rank is a function of (world seed, rank, n). After `made` stories slot s holds the newest story n with n mod slots = s, so the
content of the bank at any step follows from the step number.

Legend: T pixel frames, F latent frames, c chunks, N slots, M text keys, t text features, H W latent rows and columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..config.world import World
from ..core.geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE, Geometry
from ..core.story import SCENE_CUT_PREFIX, plan
from ..data.latents import LatentBank, LatentClip
from ..models.codec import VideoCodec
from ..world.render import frame_parameters, render_masked
from ..world.story import WorldStory, reworded, sample_story
from .clips import PaddedText, Words
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
    """The texts of all rows of a bank, one per chunk, on the device: raw_NcMt and bias_NcM, as `PaddedText` lays them out."""

    def __init__(self, rows: int, chunks: int, text: PaddedText):
        self.text = text
        self.raw = torch.zeros(rows, chunks, text.width, text.dims.text_dim, dtype=text.dtype, device=text.device)
        self.bias = torch.zeros(rows, chunks, text.width, device=text.device)

    def put(self, row: int, prompts: tuple[str, ...]) -> None:
        self.raw[row], self.bias[row] = self.text.rows(prompts)

    def words(self, row_B: torch.Tensor, dropped_B: torch.Tensor) -> Words:
        """The texts of the rows; samples in `dropped_B` read the empty prompt."""
        return self.text.dropped(Words(self.raw[row_B].flatten(0, 1), self.bias[row_B].flatten(0, 1)), dropped_B)


class StorySource:
    """Makes stories by number, each in `wordings` wordings. `story`: what `sample_story` takes beside a seed."""

    def __init__(self, *, seed: int, rank: int, wordings: int = 1, **story):
        self.seed, self.rank, self.wordings, self.story = seed, rank, wordings, story

    @classmethod
    def configured(cls, world: World, rank: int, chunks: int) -> StorySource:
        """The stories of the `world` section for one rank, `chunks` long."""
        return cls(
            seed=world.seed,
            rank=rank,
            wordings=world.wordings,
            chunks=chunks,
            shots=(world.min_shots, world.max_shots),
            characters=(1, world.max_characters),
            split=world.split,
            memory=world.memory,
            away=world.away,
        )

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
