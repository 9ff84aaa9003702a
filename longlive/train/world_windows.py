"""Rendered windows of the procedural world for VAE training: a pool on the device from which batches are cropped.

A window is `frames` consecutive frames of a story, starting at a multiple of four (as a stream's latents do) and free to contain a cut.
Window number i is a function of (seed, i) alone. The pool holds the newest `capacity` windows; every step adds a few, so rendering is paid
for once while each window gives several crops. Which windows the pool holds at step k follows from k, so a resumed run sees the same.

Legend: B batch, T frames, H W pixels, N stories, P parameters of one frame.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from ..core.geometry import TEMPORAL_STRIDE
from ..world.render import character_mask, frame_parameters, render
from ..world.story import sample_story
from .trainer import Draw, seed_of


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the run: crop size in pixels, frames, clips a step, the part of the run it lasts, and how many crops seek a character."""

    height: int
    width: int
    frames: int
    batch: int
    fraction: float
    character_crops: float


@dataclass(frozen=True)
class Pixels:
    """video_B3THW in [-1, 1], mask_B1THW in {0, 1}; both float16."""

    video: torch.Tensor
    mask: torch.Tensor


def story_parameters(seeds: list[int], *, chunks: int, shots: tuple[int, int], characters: tuple[int, int], split: str) -> torch.Tensor:
    """Frame parameters [N, T, P] of one story per seed, on the CPU."""
    stories = (sample_story(seed, chunks=chunks, shots=shots, characters=characters, split=split) for seed in seeds)
    return torch.stack([frame_parameters(story, None) for story in stories])


def render_clips(params_BTP: torch.Tensor, height: int, width: int) -> Pixels:
    """Renders whole frames of B clips on the device of their parameters."""
    batch, frames = params_BTP.shape[:2]
    flat = params_BTP.flatten(0, 1)
    video = render(flat, height=height, width=width).to(torch.float16)
    mask = character_mask(flat, height=height, width=width).to(torch.float16)
    return Pixels(*(x.unflatten(0, (batch, frames)).transpose(1, 2) for x in (video, mask)))


class WindowPool:
    """Windows of one stage. `fresh` new ones per step, `capacity` kept; `height`, `width` are those of the whole picture."""

    def __init__(self, params_NTP: torch.Tensor, stage: Stage, *, height: int, width: int, seed: int, capacity: int, fresh: int):
        self.params, self.stage, self.height, self.width, self.seed = params_NTP, stage, height, width, seed
        self.capacity, self.fresh, self.made = capacity, fresh, 0
        self.video = torch.empty(capacity, 3, stage.frames, height, width, dtype=torch.float16, device=params_NTP.device)
        self.mask = torch.empty(capacity, 1, stage.frames, height, width, dtype=torch.float16, device=params_NTP.device)

    def at(self, step: int) -> None:
        """Brings the pool to its content at `step`."""
        wanted = self.capacity + self.fresh * step
        first = max(self.made, wanted - self.capacity)
        group = max(1, 256 // self.stage.frames)
        for start in range(first, wanted, group):
            numbers = range(start, min(start + group, wanted))
            pixels = render_clips(torch.stack([self._window(i) for i in numbers]), self.height, self.width)
            slots = torch.tensor([i % self.capacity for i in numbers], device=self.params.device)
            self.video[slots], self.mask[slots] = pixels.video, pixels.mask
        self.made = max(self.made, wanted)

    def _window(self, number: int) -> torch.Tensor:
        draw = random.Random(seed_of(self.seed, number))
        stories, frames = self.params.shape[:2]
        start = TEMPORAL_STRIDE * draw.randrange((frames - self.stage.frames) // TEMPORAL_STRIDE + 1)
        return self.params[draw.randrange(stories), start : start + self.stage.frames]

    def batch(self, draw: Draw) -> Pixels:
        """`stage.batch` random windows, cropped. A part `character_crops` of the crops is centred near a random character pixel."""
        stage, device = self.stage, self.params.device
        slots = torch.randint(self.capacity, (stage.batch,), generator=draw.host).tolist()
        if (stage.height, stage.width) == (self.height, self.width):
            index = torch.tensor(slots, device=device)
            return Pixels(self.video[index], self.mask[index])
        top, left = self._corners(slots, draw)
        rows = (top[:, None] + torch.arange(stage.height, device=device))[:, None, None, :, None]
        columns = (left[:, None] + torch.arange(stage.width, device=device))[:, None, None, None, :]
        index = torch.tensor(slots, device=device)[:, None, None, None, None]
        time = torch.arange(stage.frames, device=device)[None, None, :, None, None]
        channel = torch.arange(3, device=device)[None, :, None, None, None]
        return Pixels(self.video[index, channel, time, rows, columns], self.mask[index, channel[:, :1], time, rows, columns])

    def _corners(self, slots: list[int], draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """Top and left of each crop, int64 [B], inside the picture."""
        stage, device = self.stage, self.params.device
        frame = int(torch.randint(stage.frames, (1,), generator=draw.host))
        mask = self.mask[slots, 0, frame].flatten(1)
        score = torch.rand(mask.shape, generator=draw.generator, device=device)
        seek = torch.rand(stage.batch, 1, generator=draw.generator, device=device) < stage.character_crops
        pixel = (score + mask * seek).argmax(1)
        jitter = torch.rand(2, stage.batch, generator=draw.generator, device=device) - 0.5
        top = pixel // self.width - stage.height * (0.5 + 0.7 * jitter[0])
        left = pixel % self.width - stage.width * (0.5 + 0.7 * jitter[1])
        return top.long().clamp(0, self.height - stage.height), left.long().clamp(0, self.width - stage.width)
