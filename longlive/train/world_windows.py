"""Rendered windows of the procedural world for VAE training, drawn and cropped on the device.

A window is `frames` consecutive frames of a story, starting at a multiple of four (as a stream's latents do) and free to contain a cut.
Stories are kept as frame parameters, a few kilobytes each; rendering is cheap, so no pixel outlives its step.

Legend: B batch, T frames, H W pixels, N stories, P parameters of one frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.geometry import TEMPORAL_STRIDE
from ..world.render import frame_parameters, render_masked
from ..world.story import sample_story
from .trainer import Draw


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
    """video_B3THW in [-1, 1], mask_B1THW in [0, 1]; float32."""

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
    return Pixels(*(x.unflatten(0, (batch, frames)).transpose(1, 2) for x in render_masked(flat, height, width)))


def draw_windows(params_NTP: torch.Tensor, stage: Stage, draw: Draw, height: int, width: int) -> Pixels:
    """`stage.batch` random windows of random stories; `height`, `width` are those of the whole picture.

    A part `character_crops` of the crops is centred near a random character pixel, the others anywhere.
    """
    stories, frames = params_NTP.shape[:2]
    device = params_NTP.device
    story = torch.randint(stories, (stage.batch, 1), generator=draw.host)
    start = TEMPORAL_STRIDE * torch.randint((frames - stage.frames) // TEMPORAL_STRIDE + 1, (stage.batch, 1), generator=draw.host)
    time = start + torch.arange(stage.frames)
    pixels = render_clips(params_NTP[story.to(device, non_blocking=True), time.to(device, non_blocking=True)], height, width)
    if (stage.height, stage.width) == (height, width):
        return pixels
    top, left = _corners(pixels.mask, stage, draw)
    rows = (top[:, None] + torch.arange(stage.height, device=device))[:, None, None, :, None]
    columns = (left[:, None] + torch.arange(stage.width, device=device))[:, None, None, None, :]
    index = torch.arange(stage.batch, device=device)[:, None, None, None, None]
    time = torch.arange(stage.frames, device=device)[None, None, :, None, None]
    channel = torch.arange(3, device=device)[None, :, None, None, None]
    return Pixels(pixels.video[index, channel, time, rows, columns], pixels.mask[index, channel[:, :1], time, rows, columns])


def _corners(mask_B1THW: torch.Tensor, stage: Stage, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Top and left of each crop, int64 [B], inside the picture."""
    height, width = mask_B1THW.shape[3:]
    frame = int(torch.randint(stage.frames, (1,), generator=draw.host))
    mask = mask_B1THW[:, 0, frame].flatten(1)
    score = torch.rand(mask.shape, generator=draw.generator, device=mask.device)
    seek = torch.rand(stage.batch, 1, generator=draw.generator, device=mask.device) < stage.character_crops
    pixel = (score + mask * seek).argmax(1)
    jitter = 0.5 + 0.7 * (torch.rand(2, stage.batch, generator=draw.generator, device=mask.device) - 0.5)
    top, left = pixel // width - stage.height * jitter[0], pixel % width - stage.width * jitter[1]
    return top.long().clamp(0, height - stage.height), left.long().clamp(0, width - stage.width)
