"""How a chunk looks, whatever it shows: edges, colourfulness, movement, and the seam to the chunk before it.

Each is a number that needs no other picture; its ratio to the same number of the truth is 1 for a film as good as the truth.

Legend: T pixel frames, H, W pixels, h x w = 96x160 half-size pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

LAG = 6  # frames over which movement is measured: a spinning star looks the same after 8, a square after 10
SEAM_REACH = 9  # frames on either side of a seam: two latent frames and one
SHARPEST = 100  # edges are measured on one pixel in a hundred
LEAST_STEP = 0.5 / 255  # difference of two frames below which rounding decides


@dataclass(frozen=True, kw_only=True)
class Picture:
    """`edges`: mean slope of the steepest 1 % of pixels, brightness (0..1) per pixel. `chroma`: mean of largest minus smallest channel, 0..1.

    `movement`: mean change over 6 frames beyond that over one frame, on a coarse picture, 0..1; flicker and noise are in both and cancel.
    """

    edges: float
    chroma: float
    movement: float


def measure(frames_THW3: torch.Tensor, half_T3hw: torch.Tensor) -> Picture:
    """Of uint8 frames [T, H, W, 3] and the same at half size in 0..255. Every fourth frame serves for edges and chroma."""
    some = frames_THW3[::4].float() / 255
    grey = some.mean(3)
    slope = torch.hypot(grey[:, :-1, 1:] - grey[:, :-1, :-1], grey[:, 1:, :-1] - grey[:, :-1, :-1]).flatten(1)
    steepest = slope.topk(max(1, slope.shape[1] // SHARPEST), dim=1).values
    coarse = F.avg_pool2d(half_T3hw, 4) / 255
    slow, fast = ((coarse[lag:] - coarse[:-lag]).abs().mean() for lag in (min(LAG, len(coarse) - 1), 1))
    return Picture(
        edges=float(steepest.mean()), chroma=float((some.amax(3) - some.amin(3)).mean()), movement=max(0.0, float(slow - fast))
    )


def seam(before_T3hw: torch.Tensor, after_T3hw: torch.Tensor) -> float:
    """The step from the last frame before a seam to the first one after it, over the mean step of the 8 frames on either side. 1: no seam.

    Frames at half size in 0..255. Where nothing moves at all it is 1.
    """
    near = torch.cat([before_T3hw[-SEAM_REACH:], after_T3hw[:SEAM_REACH]]) / 255
    steps = (near[1:] - near[:-1]).abs().mean((1, 2, 3))
    middle = min(SEAM_REACH, len(before_T3hw)) - 1
    usual = (steps.sum() - steps[middle]) / (len(steps) - 1)
    return float((steps[middle] + LEAST_STEP) / (usual + LEAST_STEP))
