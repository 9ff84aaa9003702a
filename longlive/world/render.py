"""Truth -> pixels. One row of numbers per frame goes in, images come out; every frame is independent of every other.

Two texture reads make a frame: a window on the setting's strip, and the distance fields of up to two characters, read at once.
Cameras move the background only: the picture follows the characters. All motion is periodic, so that long shots never run out of it.

Legend: N frames, H x W pixels, K = 2 character slots, P = 20 parameters: setting, strip x, strip y, zoom, then per slot
present, x, y, radius (pixels at 192x320), turn (radians), shape, colour, marking.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..core.geometry import chunk_pixel_range
from . import panorama, sprites
from .story import Role, ShotTruth, WorldStory
from .vocabulary import COLOURS, HEIGHT, MARKINGS, OUTLINE, PALETTE, RADIUS, SETTINGS, SHAPES, SIZES, WIDTH

SCENE_COLUMNS, SLOT_COLUMNS, SLOTS = 4, 8, 2
PARAMETERS = SCENE_COLUMNS + SLOT_COLUMNS * SLOTS
OUTLINE_WIDTH = 2.6  # pixels at 192x320
BATCH_FRAMES = {"cpu": 16, "cuda": 512}

PAN_SPEED = 2.5  # pixels a frame
ZOOM_PERIOD, ZOOM_REACH = 64, 0.5  # frames; magnification runs from 1 to 1.5 and back
TILT_PERIOD, TILT_REACH = 64, 20.0  # frames; pixels
MOVE_SPEED, MOVE_REACH = 3.75, (90.0, 26.0)  # pixels a frame; pixels to either side of home, alone or with another
MOVE_SPEED_TWO = 2.4
BOUNCE_PERIOD, BOUNCE_HEIGHT = 28, 46.0
ORBIT_PERIOD, ORBIT_RADIUS = 48, 32.0
SPIN_PERIOD = 40
GROW_PERIOD, GROW_REACH = 48, 0.55  # frames; the radius runs from 1 to 1.55 times its size and back


def _camera(shot: ShotTruth, t: torch.Tensor) -> torch.Tensor:
    """[T, 4]: setting, strip x, strip y, zoom at frames `t` (float64, since the shot began)."""
    x, y, zoom = torch.full_like(t, shot.offset), torch.zeros_like(t), torch.ones_like(t)
    if shot.camera in ("left", "right"):
        x = x + PAN_SPEED * t * (1 if shot.camera == "right" else -1)
    elif shot.camera == "zoom":
        zoom = 1 + ZOOM_REACH * 0.5 * (1 - torch.cos(t * (2 * math.pi / ZOOM_PERIOD)))
    elif shot.camera == "tilt":
        y = -TILT_REACH * torch.sin(t * (2 * math.pi / TILT_PERIOD))
    setting = torch.full_like(t, SETTINGS.index(shot.setting))
    return torch.stack([setting, torch.remainder(x, panorama.STRIP_WIDTH), y, zoom], dim=1)


def _slot(role: Role, t: torch.Tensor, alone: bool) -> torch.Tensor:
    """[T, 8]: the columns of one character at frames `t` (float64, since the shot began)."""
    look = role.character
    x, y = torch.full_like(t, role.home_x), torch.full_like(t, role.home_y)
    radius, turn = torch.full_like(t, RADIUS[SIZES.index(look.size)]), torch.zeros_like(t)
    if role.action == "moves":
        reach, speed = (MOVE_REACH[0], MOVE_SPEED) if alone else (MOVE_REACH[1], MOVE_SPEED_TWO)
        phase = torch.remainder(t * speed / reach + 1, 4)  # a triangle wave that starts at home
        x = x + role.direction * reach * (1 - (phase - 2).abs())
    elif role.action == "bounces":
        phase = torch.remainder(t / BOUNCE_PERIOD, 1)
        y = y + 22 - BOUNCE_HEIGHT * 4 * phase * (1 - phase)
    elif role.action == "orbits":
        angle = t * (2 * math.pi / ORBIT_PERIOD)
        x = x + role.direction * ORBIT_RADIUS * torch.sin(angle)
        y = y - ORBIT_RADIUS * torch.cos(angle)
    elif role.action == "spins":
        turn = torch.remainder(t * (role.direction * 2 * math.pi / SPIN_PERIOD), 2 * math.pi)
    elif role.action == "grows":
        radius = radius * (1 + GROW_REACH * 0.5 * (1 - torch.cos(t * (2 * math.pi / GROW_PERIOD))))
    kinds = (SHAPES.index(look.shape), COLOURS.index(look.colour), MARKINGS.index(look.marking))
    return torch.stack([torch.ones_like(t), x, y, radius, turn, *(torch.full_like(t, k) for k in kinds)], dim=1)


def shot_parameters(shot: ShotTruth, t: torch.Tensor) -> torch.Tensor:
    """float32 [T, P] of frames `t` counted from the start of `shot`. An absent character has radius 1 and is not present."""
    t = t.double()
    slots = [_slot(role, t, len(shot.roles) == 1) for role in shot.roles]
    absent = torch.zeros(len(t), SLOT_COLUMNS, dtype=torch.float64)
    absent[:, 3] = 1
    return torch.cat([_camera(shot, t), *slots, *[absent] * (SLOTS - len(slots))], dim=1).float()


def frame_parameters(story: WorldStory, frames: range | None = None) -> torch.Tensor:
    """float32 [T, P] of pixel frames `frames` (contiguous; None: the whole film), on the CPU."""
    frames = range(story.frames) if frames is None else frames
    parts = []
    for shot, (start, stop) in zip(story.shots, story.shot_frames):
        low, high = max(start, frames.start), min(stop, frames.stop)
        if low < high:
            parts.append(shot_parameters(shot, torch.arange(low - start, high - start)))
    return torch.cat(parts)


def chunk_parameters(story: WorldStory, chunk: int) -> torch.Tensor:
    """float32 [29 or 32, P]: the frames of one chunk."""
    return frame_parameters(story, range(*chunk_pixel_range(chunk)))


def _pixel_grid(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres of the pixels in units of the 192x320 picture: x [1, 1, W], y [1, H, 1]. Other ratios are cropped or widened about the middle."""
    scale = HEIGHT / height
    x = (torch.arange(width, device=device) + 0.5 - width / 2) * scale + WIDTH / 2
    y = (torch.arange(height, device=device) + 0.5) * scale
    return x[None, None, :], y[None, :, None]


def _background(p_NP: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """float32 [N, 3, H, W] in [-1, 1]."""
    setting, sx, sy, zoom = (p_NP[:, i, None, None] for i in range(SCENE_COLUMNS))
    u = torch.remainder(sx + WIDTH / 2 + (x - WIDTH / 2) / zoom - 0.5, panorama.STRIP_WIDTH)
    v = (sy + HEIGHT / 2 + (y - HEIGHT / 2) / zoom + panorama.TOP - 0.5).clamp(0, panorama.STRIP_HEIGHT - 1)
    v = v + setting * panorama.STRIP_HEIGHT
    picture = panorama.atlas(p_NP.device)
    rows, columns = picture.shape[2:]
    u, v = torch.broadcast_tensors(u * (2 / (columns - 1)) - 1, v * (2 / (rows - 1)) - 1)
    n, h, w = u.shape
    flat = F.grid_sample(picture, torch.stack([u, v], dim=-1).view(1, n * h, w, 2), align_corners=True, padding_mode="border")
    return flat.view(3, n, h, w).transpose(0, 1)


def _distances(p_NP: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance to body and to ink of both characters in pixels at 192x320, each [N, K, H, W]; absent characters are far away."""
    slots = p_NP[:, SCENE_COLUMNS:].view(-1, SLOTS, SLOT_COLUMNS)
    present, cx, cy, radius, turn, shape, _, marking = (slots[:, :, i, None, None] for i in range(SLOT_COLUMNS))
    dx, dy = (x[:, None] - cx) / radius, (y[:, None] - cy) / radius
    cos, sin = turn.cos(), turn.sin()
    edge = sprites.REACH * (1 - 1 / sprites.TEXELS)
    u = (cos * dx + sin * dy).clamp(-edge, edge) / (2 * sprites.REACH) + 0.5
    v = (cos * dy - sin * dx).clamp(-edge, edge) / (2 * sprites.REACH) + 0.5
    table = sprites.atlas(p_NP.device)
    grid = torch.stack([(u + shape) * (2 / len(SHAPES)) - 1, (v + marking) * (2 / len(MARKINGS)) - 1], dim=-1)
    n, k, h, w, _ = grid.shape
    read = F.grid_sample(table, grid.view(1, n * k * h, w, 2), align_corners=False, padding_mode="border").view(2, n, k, h, w)
    read = read * radius + (1 - present) * 1e4
    return read[0], read[1]


def _slices(p_NP: torch.Tensor) -> list[torch.Tensor]:
    return list(p_NP.split(BATCH_FRAMES["cuda" if p_NP.is_cuda else "cpu"]))


def _paint(p_NP: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(image, cover of the characters)"""
    x, y = _pixel_grid(height, width, p_NP.device)
    image = _background(p_NP, x, y)
    body, ink = _distances(p_NP, x, y)
    sharp = height / HEIGHT  # pixels per unit, so that edges stay one pixel wide at any size
    palette = torch.tensor(PALETTE, device=p_NP.device) / 127.5 - 1
    dark = (torch.tensor(OUTLINE, device=p_NP.device) / 127.5 - 1)[None, :, None, None]
    whole = (0.5 - body * sharp).clamp(0, 1)
    fill = (0.5 - torch.maximum(body + OUTLINE_WIDTH, -ink) * sharp).clamp(0, 1)
    for k in range(SLOTS):
        colour = palette[p_NP[:, SCENE_COLUMNS + k * SLOT_COLUMNS + 6].long()][:, :, None, None]
        image = torch.lerp(image, dark + (colour - dark) * fill[:, k, None], whole[:, k, None])
    return image, whole.amax(1, keepdim=True)


def render(params_NP: torch.Tensor, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """float32 [N, 3, H, W] in [-1, 1] on the device of `params_NP` (float32 [N, P])."""
    return torch.cat([_paint(part, height, width)[0] for part in _slices(params_NP)])


def render_masked(params_NP: torch.Tensor, height: int = HEIGHT, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    """`render`, and float32 [N, 1, H, W] in [0, 1]: how much of each pixel is covered by characters, outline included."""
    images, masks = zip(*(_paint(part, height, width) for part in _slices(params_NP)))
    return torch.cat(images), torch.cat(masks)
