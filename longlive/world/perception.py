"""What can be read from pixels without learning: where each colour is, the setting, the camera, the cuts.

The palette is far from every colour of every setting, so a pixel belongs to the nearest known colour. Settings are told by the mean
colour of their rows, cameras by the background's own motion (a least-squares fit of shift and magnification to image gradients).

Legend: T frames, h x w half-size pixels (96x160), K = 8 colours. Positions and lengths are in pixels at 192x320.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from . import panorama
from .vocabulary import CAMERAS, HEIGHT, PALETTE, SETTINGS, WIDTH

HALF = (HEIGHT // 2, WIDTH // 2)
PALETTE_REACH = 85.0  # 8-bit RGB distance beyond which a pixel has no palette colour
BACKGROUND_COLOURS = 14  # per setting
PROFILE_ROWS = 12
BLOB_REACH = 74.0  # pixels: nothing of a character is farther from its centre
LEAST_AREA = 120.0  # pixels of its own colour that a character shows at least, averaged over a shot
CUT_STEP, CUT_RATIO = 0.045, 2.5


@functools.lru_cache(maxsize=None)
def _background_colours(device: torch.device) -> torch.Tensor:
    """float32 [S * 14, 3] in 0..255: the colours that settings are made of, by farthest-point choice and a few rounds of k-means."""
    found = []
    for setting in SETTINGS:
        pixels = panorama.strip(setting).flatten(1).T[::7].float()
        centres = pixels.mean(0, keepdim=True)
        while len(centres) < BACKGROUND_COLOURS:
            centres = torch.cat([centres, pixels[torch.cdist(pixels, centres).amin(1).argmax()][None]])
        for _ in range(6):
            nearest = torch.cdist(pixels, centres).argmin(1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, pixels)
            counts = torch.bincount(nearest, minlength=len(centres))[:, None]
            centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        found.append(centres)
    return torch.cat(found).to(device)


@functools.lru_cache(maxsize=None)
def _profiles(device: torch.device) -> torch.Tensor:
    """float32 [S, 12, 3] in 0..255: mean colour of the rows of each setting under a level camera."""
    rows = []
    for setting in SETTINGS:
        level = panorama.strip(setting)[:, panorama.TOP : panorama.TOP + HEIGHT].float()
        rows.append(level.mean(2).view(3, PROFILE_ROWS, -1).mean(2).T)
    return torch.stack(rows).to(device)


def half_size(video_THWC: torch.Tensor) -> torch.Tensor:
    """uint8 [T, H, W, 3] of any size -> float32 [T, 3, 96, 160] in 0..255."""
    return F.interpolate(video_THWC.permute(0, 3, 1, 2).float(), size=HALF, mode="area")


def colour_masks(frames_T3hw: torch.Tensor) -> torch.Tensor:
    """float32 [T, 8, h, w], 1 where a pixel (0..255) is nearer to one palette colour than to any other and to any setting's colours."""
    device = frames_T3hw.device
    palette = torch.tensor(PALETTE, device=device, dtype=torch.float32)
    known = torch.cat([palette, _background_colours(device)])
    t, _, h, w = frames_T3hw.shape
    pixels = frames_T3hw.permute(0, 2, 3, 1).reshape(-1, 3).float()
    # |p - c|^2 without the |p|^2 that all share; one matrix product in float32
    with torch.autocast(device.type, enabled=False):
        score = torch.addmm((known**2).sum(1), pixels, known.T, alpha=-2)
    best, index = score.min(1)
    near = best + (pixels**2).sum(1) < PALETTE_REACH**2
    index = torch.where(near & (index < len(PALETTE)), index, len(PALETTE)).view(t, h, w)
    return torch.stack([(index == k).float() for k in range(len(PALETTE))], dim=1)


def follow(mask_Thw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the largest blob of each mask is: centre [T, 2] (x, y) and area [T], in pixels at 192x320. Empty masks: picture centre, 0."""
    t, h, w = mask_Thw.shape
    crowd = F.avg_pool2d(mask_Thw[:, None], 2)
    crowd = F.avg_pool2d(F.avg_pool2d(crowd, (1, 15), 1, (0, 7)), (15, 1), 1, (7, 0))[:, 0]  # how full a square of 60 pixels is
    peak = crowd.flatten(1).argmax(1)
    y = torch.arange(h, device=mask_Thw.device, dtype=torch.float32)[None, :, None]
    x = torch.arange(w, device=mask_Thw.device, dtype=torch.float32)[None, None, :]
    cx, cy = (peak % (w // 2)).float() * 2 + 0.5, (peak // (w // 2)).float() * 2 + 0.5
    for reach in (46.0, BLOB_REACH):
        near = mask_Thw * ((x - cx[:, None, None]) ** 2 + (y - cy[:, None, None]) ** 2 < (reach / 2) ** 2)
        total = near.sum((1, 2))
        some = total > 0
        cx = torch.where(some, (near.sum(1) * x[0]).sum(1) / total.clamp(min=1), cx)
        cy = torch.where(some, (near.sum(2) * y[0, :, 0]).sum(1) / total.clamp(min=1), cy)
    middle = torch.tensor([WIDTH / 2, HEIGHT / 2], device=mask_Thw.device)
    return torch.where(some[:, None], torch.stack([cx, cy], 1) * 2 + 1, middle), total * 4


def find_characters(masks_TKhw: torch.Tensor) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """At most two (colour index, centre [T, 2], area [T]) of one shot, the larger first.

    A blob on top of a larger one (the shine of another character) is none of its own.
    """
    shown = masks_TKhw.sum((2, 3)).mean(0) * 4
    blobs = [(k, *follow(masks_TKhw[:, k])) for k in range(len(PALETTE)) if shown[k] >= LEAST_AREA]
    blobs.sort(key=lambda blob: -float(blob[2].mean()))
    found: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    for colour, centre, area in blobs:
        gaps = [(torch.hypot(*(centre - other).T) / (a.mean() / math.pi).sqrt()).mean() for _, other, a in found]
        if area.mean() >= LEAST_AREA and len(found) < 2 and not any(gap < 1.3 for gap in gaps):
            found.append((colour, centre, area))
    return found


def median_colour(frames_T3hw: torch.Tensor, mask_Thw: torch.Tensor) -> tuple[float, float, float]:
    """Median RGB, 0..255, of the pixels under a mask that is not empty: edges and markings do not sway it."""
    red, green, blue = frames_T3hw.transpose(0, 1)[:, mask_Thw > 0].median(1).values.tolist()
    return red, green, blue


def character_cover(masks_TKhw: torch.Tensor) -> torch.Tensor:
    """float32 [T, h, w]: 1 on characters and 16 pixels around them, from the masks of all colours that show at least a speck."""
    solid = F.avg_pool2d(masks_TKhw.amax(1, keepdim=True), 3, 1, 1) > 0.3
    return F.max_pool2d(solid.float(), 17, 1, 8)[:, 0]


def read_setting(frames_T3hw: torch.Tensor, cover_Thw: torch.Tensor) -> tuple[int, float]:
    """Index of the setting whose row colours are nearest, and by how much (0: tie, 1: certain). Characters are left out."""
    free = 1 - cover_Thw[:, None]
    rows = (frames_T3hw * free).sum((0, 3)) / free.sum((0, 3)).clamp(min=1)
    profile = rows.view(3, PROFILE_ROWS, -1).mean(2).T
    weight = free.sum((0, 3)).view(PROFILE_ROWS, -1).mean(1)
    distance = (((_profiles(frames_T3hw.device) - profile) ** 2).mean(2) * weight / weight.sum().clamp(min=1)).sum(1).sqrt()
    first, second = distance.sort().values[:2].tolist()
    return int(distance.argmin()), 1 - first / max(second, 1e-6)


def background_motion(frames_T3hw: torch.Tensor, cover_Thw: torch.Tensor) -> torch.Tensor:
    """float32 [T-1, 3]: shift in x, shift in y (pixels a frame) and growth (per frame) of the background between neighbouring frames."""
    grey = F.avg_pool2d(frames_T3hw.mean(1, keepdim=True), 2) / 255
    grey = F.avg_pool2d(F.pad(grey, (2, 2, 2, 2), mode="replicate"), 5, 1)[:, 0]
    free = 1 - F.max_pool2d(cover_Thw[:, None], 2)[:, 0]
    middle = (grey[1:] + grey[:-1]) / 2
    gx = (middle[:, 1:-1, 2:] - middle[:, 1:-1, :-2]) / 2
    gy = (middle[:, 2:, 1:-1] - middle[:, :-2, 1:-1]) / 2
    gt = (grey[1:] - grey[:-1])[:, 1:-1, 1:-1]
    n, h, w = gt.shape
    y, x = torch.meshgrid(torch.arange(h, device=grey.device) + 0.5 - h / 2, torch.arange(w, device=grey.device) + 0.5 - w / 2, indexing="ij")
    design = torch.stack([gx, gy, gx * x + gy * y], dim=-1).view(n, -1, 3)
    target, weight = -gt.reshape(n, -1), (free[1:] * free[:-1])[:, 1:-1, 1:-1].reshape(n, -1)
    ridge = torch.diag(torch.tensor([1e-3, 1e-3, 1.0], device=grey.device))
    for _ in range(3):
        normal = design.transpose(1, 2) @ (design * weight[..., None]) + ridge
        motion = torch.linalg.solve(normal, (design.transpose(1, 2) @ (target * weight)[..., None]))[..., 0]
        miss = (target - (design @ motion[..., None])[..., 0]).abs()
        weight = weight * (0.01 / (miss + 0.01))
    return motion * torch.tensor([4.0, 4.0, 1.0], device=grey.device)


def read_camera(motion_T3: torch.Tensor) -> tuple[int, float]:
    """Index of the camera, and its evidence (0: none, 1: as in the world), from the background's motion over about one chunk."""
    path = torch.cumsum(motion_T3, 0)
    seconds = len(motion_T3) / 28
    pan = float(path[-1, 0]) / (70 * seconds)
    tilt = float(path[:, 1].max() - path[:, 1].min()) / 20
    zoom = float(path[:, 2].max() - path[:, 2].min()) / 0.35
    evidence = {"still": 0.33, "left": pan, "right": -pan, "zoom": zoom, "tilt": tilt}
    name = max(evidence, key=lambda camera: evidence[camera])
    return CAMERAS.index(name), min(max(evidence[name], 0.0), 1.0)


def frame_steps(frames_T3hw: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [T]: mean difference (0..1) of each frame to the one before it, on a coarse picture; 0 for a film's first frame."""
    coarse = F.avg_pool2d(frames_T3hw, 4) / 255
    before = coarse[:1] if before is None else F.avg_pool2d(before, 4) / 255
    return (coarse - torch.cat([before, coarse[:-1]])).abs().mean((1, 2, 3))


def find_cuts(steps_T: torch.Tensor) -> list[int]:
    """Frames at which a new shot begins: steps that are large, and large against the 12 frames on either side."""
    steps = steps_T.tolist()
    cuts: list[int] = []
    for t in range(1, len(steps)):
        around = sorted(steps[max(1, t - 12) : t] + steps[t + 1 : t + 13])
        usual = around[len(around) // 2] if around else 0.0
        if steps[t] >= CUT_STEP and steps[t] >= CUT_RATIO * usual and steps[t] >= max(steps[max(1, t - 4) : t + 5]):
            if not cuts or t - cuts[-1] > 4:
                cuts.append(t)
    return cuts
