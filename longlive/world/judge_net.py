"""The learned part of the judge: what one tracked character is and does, from crops that follow it and from its track.

Ten frames over about one chunk, each a 40x40 crop around the character, scaled by its own area: colours and the mask of its colour go
through a small convolution, the per-frame features and the track through a convolution over time, the track also by itself through two
linear layers; one linear layer per question.

Legend: N characters, S = 10 sampled frames, 4 crop channels (RGB, mask), 4 track features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .vocabulary import ACTIONS, HEIGHT, MARKINGS, SHAPES, SIZES, WIDTH

SAMPLES, STRIDE, CROP = 10, 3, 40
SPAN = 1 + STRIDE * (SAMPLES - 1) + 1  # frames of a shot that are looked at, the first one included
HEADS = {"shape": SHAPES, "action": ACTIONS, "marking": MARKINGS, "size": SIZES}


def sample_times(frames: int) -> list[int]:
    """Which frames of a shot of `frames` frames are looked at: every third from the second on, the last one repeated in short shots."""
    return [min(1 + STRIDE * k, frames - 1) for k in range(SAMPLES)]


def look(
    frames_NS3hw: torch.Tensor, mask_NShw: torch.Tensor, centre_NS2: torch.Tensor, area_NS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops [N, S, 4, 40, 40] about in -1..1 and track features [N, S, 4] of tracked characters.

    frames in 0..255 at half size, centre in pixels at 192x320, area in square pixels.
    """
    n, s, _, h, w = frames_NS3hw.shape
    radius = (area_NS.median(1).values / 2.2).clamp(min=60).sqrt()
    half_side = (2.1 * radius).clamp(max=100)
    axis = (torch.arange(CROP, device=frames_NS3hw.device) + 0.5) / CROP * 2 - 1
    x = (centre_NS2[..., 0, None] + half_side[:, None, None] * axis) * (2 / WIDTH) - 1
    y = (centre_NS2[..., 1, None] + half_side[:, None, None] * axis) * (2 / HEIGHT) - 1
    grid = torch.stack([x[:, :, None, :].expand(n, s, CROP, CROP), y[:, :, :, None].expand(n, s, CROP, CROP)], dim=-1)
    source = torch.cat([frames_NS3hw / 127.5 - 1, mask_NShw[:, :, None] * 2 - 1], dim=2)
    crops = F.grid_sample(source.flatten(0, 1), grid.flatten(0, 1), align_corners=False, padding_mode="border").view(n, s, 4, CROP, CROP)
    away = (centre_NS2 - centre_NS2.mean(1, keepdim=True)) / 30
    growth = 2 * (area_NS.clamp(min=30).log() - area_NS.clamp(min=30).log().mean(1, keepdim=True))
    size = ((radius - 30) / 12)[:, None].expand(n, s)
    return crops, torch.cat([away, growth[..., None], size[..., None]], dim=2)


class JudgeNet(nn.Module):
    """crops [N, S, 4, 40, 40], track [N, S, 4] -> logits per head, each [N, classes]."""

    def __init__(self, width: int = 24, features: int = 96):
        super().__init__()
        steps = [(4, width, 2), (width, 2 * width, 2), (2 * width, 3 * width, 1), (3 * width, 3 * width, 2)]
        layers: list[nn.Module] = []
        for inside, outside, stride in steps:
            layers += [nn.Conv2d(inside, outside, 3, stride, 1), nn.GroupNorm(8, outside), nn.SiLU()]
        self.eye = nn.Sequential(*layers, nn.Conv2d(3 * width, width, 1), nn.SiLU(), nn.Flatten())
        self.squeeze = nn.Linear(width * 25, features)
        self.time = nn.Sequential(
            nn.Conv1d(features + 4, features, 3, 1, 1),
            nn.SiLU(),
            nn.Conv1d(features, features, 3, 1, 1),
            nn.SiLU(),
            nn.Conv1d(features, features, 3, 1, 1),
        )
        self.path = nn.Sequential(nn.Flatten(), nn.Linear(SAMPLES * 4, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(4 * features, len(classes)) for name, classes in HEADS.items()})

    def forward(self, crops: torch.Tensor, track: torch.Tensor) -> dict[str, torch.Tensor]:
        n, s = crops.shape[:2]
        seen = F.silu(self.squeeze(self.eye(crops.flatten(0, 1)))).view(n, s, -1)
        over_time = F.silu(self.time(torch.cat([seen, track], dim=2).transpose(1, 2)))
        summary = torch.cat([seen.mean(1), over_time.mean(2), over_time.amax(2), self.path(track)], dim=1)
        return {name: head(summary) for name, head in self.heads.items()}
