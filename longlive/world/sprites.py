"""The shapes and markings as textures of signed distance, so that a character of any size and turn costs one texture read per pixel.

Coordinates are in units of the character's radius: x to the right, y down, [-1.7, 1.7] on both axes. Distances are negative inside.
"""

from __future__ import annotations

import functools
import math

import torch

from .vocabulary import MARKINGS, SHAPES

TEXELS, REACH = 160, 1.7
FAR = 1.0


def _polygon(x: torch.Tensor, y: torch.Tensor, points: list[tuple[float, float]]) -> torch.Tensor:
    """Exact signed distance to a simple polygon."""
    nearest, sign = torch.full_like(x, math.inf), torch.ones_like(x)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1]):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        t = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, (wx - t * ex) ** 2 + (wy - t * ey) ** 2)
        a, b, c = y >= ay, y < by, ex * wy > ey * wx
        sign = torch.where((a & b & c) | (~a & ~b & ~c), -sign, sign)
    return sign * nearest.sqrt()


def _ring_points(count: int, outer: float, inner: float | None = None) -> list[tuple[float, float]]:
    """Corners of a regular polygon, or of a star when `inner` is given; the first corner points up."""
    steps = count if inner is None else 2 * count
    radii = [outer if inner is None or k % 2 == 0 else inner for k in range(steps)]
    return [(r * math.sin(2 * math.pi * k / steps), -r * math.cos(2 * math.pi * k / steps)) for k, r in enumerate(radii)]


def _heart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A heart of height and width about 2 as a fine polygon of its parametric curve."""
    points = []
    for k in range(96):
        t = 2 * math.pi * k / 96
        px = 16 * math.sin(t) ** 3
        py = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((px / 15.6, -(py + 2.2) / 15.6))
    return _polygon(x, y, points)


def _crescent(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A fat moon whose horns point right, its body near the centre."""
    outer = torch.hypot(x - 0.28, y) - 1.08
    bite = torch.hypot(x - 0.86, y) - 0.80
    return torch.maximum(outer, -bite)


def _body(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if shape == "circle":
        return torch.hypot(x, y) - 0.98
    if shape == "square":
        return _polygon(x, y, [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)])
    if shape == "triangle":
        return _polygon(x, y + 0.08, _ring_points(3, 1.2))
    if shape == "star":
        return _polygon(x, y, _ring_points(5, 1.3, 0.6))
    if shape == "heart":
        return _heart(x, y)
    if shape == "cross":
        a, b = 0.36, 1.05
        return _polygon(x, y, [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)])
    if shape == "diamond":
        return _polygon(x, y, [(0, -1.34), (0.84, 0), (0, 1.34), (-0.84, 0)])
    return _crescent(x, y)


def _mark(shape: str, marking: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Distance to the marking's ink. Dots stand off the centre, so that turning shows on a circle too."""
    if shape == "crescent":
        x = x + 0.38  # the body lies left of the centre
    if marking == "dotted":
        return torch.hypot(x, y + 0.26) - 0.28
    if marking == "striped":
        return (torch.remainder(x + 0.31, 0.62) - 0.31).abs() - 0.13
    if marking == "eyes":
        apart = 0.19 if shape == "crescent" else 0.27
        return torch.hypot(x.abs() - apart, y + 0.04) - 0.19
    return torch.full_like(x, FAR)


@functools.lru_cache(maxsize=None)
def atlas(device: torch.device) -> torch.Tensor:
    """Body and ink distance of every shape and marking, float32 [1, 2, len(MARKINGS) * 160, len(SHAPES) * 160], in radii, at most 1."""
    axis = ((torch.arange(TEXELS, dtype=torch.float32) + 0.5) / TEXELS * 2 - 1) * REACH
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    bodies = [_body(shape, x, y) for shape in SHAPES]
    rows = [
        torch.cat([torch.stack([body, _mark(shape, marking, x, y)]) for shape, body in zip(SHAPES, bodies)], dim=2) for marking in MARKINGS
    ]
    return torch.cat(rows, dim=1).clamp(max=FAR)[None].to(device)
