"""Pixels in [-1, 1] <-> bytes: the one place that rounds."""

from __future__ import annotations

import torch


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] with channels in dimension 1 ([B, 3, T, H, W] or [N, 3, H, W]) -> uint8 with channels last, rounded and clamped, on the same device."""
    scaled = pixels.float().add(1).mul_(127.5).round_().clamp_(0, 255)
    return scaled.to(torch.uint8).movedim(1, -1).contiguous()
