"""The settings as pictures: one long strip per setting, periodic in x, drawn once from distance functions and integer hashes.

A camera is a window on the strip, so that a background costs one texture read per pixel. All colours are muted: nothing here is as
saturated, or as white, as a character. The strips are drawn on the CPU and rounded to 8 bits, hence the same on every device.
"""

from __future__ import annotations

import functools

import torch

from .draw import Draw
from .vocabulary import SETTINGS

STRIP_HEIGHT, STRIP_WIDTH = 240, 1280  # pixels
TOP = 24  # rows of the strip above the picture of a level camera


class Painter:
    """A strip being painted. x in [0, 1280), wraps round; y in [-24, 216), picture rows are 0..191."""

    def __init__(self, seed: str):
        self.draw = Draw("panorama", seed)
        self.y = torch.arange(STRIP_HEIGHT, dtype=torch.float32)[:, None] - TOP + 0.5
        self.x = torch.arange(STRIP_WIDTH, dtype=torch.float32)[None, :] + 0.5
        self.rgb = torch.zeros(3, STRIP_HEIGHT, STRIP_WIDTH)

    def wave(self, *terms: tuple[int, float, float]) -> torch.Tensor:
        """Sum of amplitude * sin(cycles round the strip), a curve of x. Terms are (cycles, amplitude, phase)."""
        turn = self.x * (2 * torch.pi / STRIP_WIDTH)
        return sum(a * torch.sin(n * turn + p) for n, a, p in terms)

    def fill(self, distance: torch.Tensor, colour: tuple[int, int, int]) -> None:
        """Paints where `distance` (pixels) is negative, with a smooth edge."""
        alpha = (0.5 - distance).clamp(0, 1)
        self.rgb += alpha * (torch.tensor(colour, dtype=torch.float32)[:, None, None] - self.rgb)

    def gradient(self, top: tuple[int, int, int], bottom: tuple[int, int, int], y0: float, y1: float) -> None:
        t = ((self.y - y0) / (y1 - y0)).clamp(0, 1)
        a, b = (torch.tensor(c, dtype=torch.float32)[:, None, None] for c in (top, bottom))
        self.rgb = (a + (b - a) * t).expand_as(self.rgb).clone()

    def _near(self, x: float, reach: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns within `reach` of column `x`, and their signed distance to it: small things are painted on a small part."""
        half = min(int(reach) + 3, STRIP_WIDTH // 2 - 1)
        columns = torch.arange(int(x) - half, int(x) + half + 1)
        return columns % STRIP_WIDTH, (columns + 0.5 - x)[None, :]

    def _spot(self, columns: torch.Tensor, distance: torch.Tensor, colour: tuple[int, int, int]) -> None:
        part = self.rgb[:, :, columns]
        alpha = (0.5 - distance).clamp(0, 1)
        self.rgb[:, :, columns] = part + alpha * (torch.tensor(colour, dtype=torch.float32)[:, None, None] - part)

    def disc(self, x: float, y: float, rx: float, ry: float, colour: tuple[int, int, int]) -> None:
        columns, dx = self._near(x, rx)
        d = ((dx / rx) ** 2 + ((self.y - y) / ry) ** 2).sqrt()
        self._spot(columns, (d - 1) * min(rx, ry), colour)

    def box(self, x: float, y: float, rx: float, ry: float, colour: tuple[int, int, int], round_: float = 0.0) -> None:
        columns, dx = self._near(x, rx)
        qx, qy = dx.abs() - rx + round_, (self.y - y).abs() - ry + round_
        outside = (qx.clamp(min=0) ** 2 + qy.clamp(min=0) ** 2).sqrt()
        self._spot(columns, outside + torch.maximum(qx, qy).clamp(max=0) - round_, colour)

    def tent(self, x: float, top: float, bottom: float, half: float, colour: tuple[int, int, int]) -> None:
        """A triangle that stands on `bottom` with its tip at (`x`, `top`)."""
        columns, dx = self._near(x, half)
        slope = half / (bottom - top)
        side = (dx.abs() - (self.y - top) * slope) / (1 + slope**2) ** 0.5
        self._spot(columns, torch.maximum(side, self.y - bottom), colour)

    def places(self, count: int, jitter: float = 0.35) -> list[float]:
        """`count` columns, evenly spaced but for `jitter` of the spacing."""
        step = STRIP_WIDTH / count
        return [(i + 0.5 + self.draw.spread(jitter)) * step for i in range(count)]


def _meadow(p: Painter) -> None:
    p.gradient((128, 178, 214), (190, 214, 220), -24, 100)
    for x in p.places(9):
        y, size = p.draw.between(4, 40), p.draw.between(15, 24)
        for k in (-1, 0, 1):
            p.disc(x + k * size, y + (4 if k else 0), size * 1.1, size * (0.42 if k else 0.6), (200, 211, 218))
    p.fill(84 + p.wave((3, 12, 0.0), (7, 6, 1.0)) - p.y, (118, 160, 120))
    for x in p.places(11):
        y, size = p.draw.between(72, 84), p.draw.between(13, 19)
        p.box(x, y + 14, 3.5, 16, (112, 88, 70))
        p.disc(x, y - 8, size, size * 1.1, (84, 128, 88))
    p.fill(106 + p.wave((5, 5, 2.0)) - p.y, (148, 178, 106))
    p.fill(150 + p.wave((4, 6, 0.5)) - p.y, (134, 166, 96))
    for x in p.places(40, 0.5):
        y = p.draw.between(118, 205)
        p.box(x, y + 6, 1.3, 6, (100, 136, 80))
        p.disc(x, y, 4.5, 4.5, p.draw.pick(((196, 150, 168), (204, 190, 140), (176, 160, 196))))


def _night(p: Painter) -> None:
    p.gradient((14, 16, 40), (44, 44, 84), -24, 120)
    for x in p.places(90, 0.5):
        size = 1.2 + p.draw.unit()
        p.disc(x, p.draw.between(-20, 84), size, size, (150, 156, 186))
    for x in p.places(2, 0.2):
        p.disc(x, 22, 15, 15, (196, 194, 172))
        p.disc(x + 5, 18, 3.5, 3.5, (172, 170, 150))
        p.disc(x - 5, 27, 4.5, 4.5, (172, 170, 150))
    for x in p.places(26, 0.2):
        p.box(x, 130, p.draw.between(16, 25), p.draw.between(40, 72), (30, 32, 62))
    for x in p.places(18, 0.2):
        half, top = p.draw.between(20, 29), p.draw.between(66, 118)
        p.box(x, (top + 172) / 2, half, (172 - top) / 2, (46, 48, 76))
        for column in range(-1, 2):
            for row in range(int((150 - top) // 16)):
                lit = (176, 158, 104) if p.draw.chance(0.5) else (36, 38, 62)
                p.box(x + column * 13, top + 12 + row * 16, 3.5, 4.5, lit)
    p.fill(158 - p.y, (34, 36, 50))
    for x in p.places(16, 0.0):
        p.box(x, 184, 20, 2.2, (120, 118, 112))


def _beach(p: Painter) -> None:
    p.gradient((146, 198, 216), (194, 214, 215), -24, 78)
    p.disc(300, 14, 14, 14, (226, 214, 160))
    p.disc(960, 10, 14, 14, (226, 214, 160))
    for x in p.places(6):
        p.tent(x, p.draw.between(50, 62), 80, p.draw.between(30, 56), (140, 168, 176))
    p.fill(78 - p.y, (88, 158, 172))
    for x in p.places(36, 0.5):
        p.box(x, p.draw.between(84, 112), p.draw.between(8, 15), 1.3, (138, 190, 196), 1.2)
    for x in p.places(5, 0.25):
        p.tent(x, 62, 88, 12, (206, 198, 182))
        p.box(x, 90, 14, 3, (122, 88, 70), 2)
    p.fill(119 + p.wave((9, 3, 0.0), (16, 1.5, 1.0)) - p.y, (190, 212, 204))
    p.fill(124 + p.wave((9, 3, 0.0), (16, 1.5, 1.0)) - p.y, (222, 202, 154))
    p.fill(160 + p.wave((5, 5, 1.5)) - p.y, (212, 190, 142))
    for x in p.places(7, 0.3):
        p.box(x, 112, 3.6, 44, (134, 104, 76))
        for k in (-1, 1):
            p.disc(x + k * 16, 70, 18, 5.5, (92, 136, 96))
            p.disc(x + k * 11, 61, 13, 5, (104, 148, 104))
    for x in p.places(26, 0.5):
        p.disc(x, p.draw.between(140, 208), 4.5, 3.4, p.draw.pick(((196, 158, 136), (186, 168, 138), (170, 160, 150))))


def _laboratory(p: Painter) -> None:
    p.gradient((172, 188, 192), (160, 178, 182), -24, 130)
    for x in p.places(32, 0.0):
        p.box(x, 50, 0.9, 90, (146, 164, 170))
    for y in (-6, 24, 54, 84, 114):
        p.fill((p.y - y).abs() - 0.8 + 0 * p.x, (146, 164, 170))
    for x in p.places(8, 0.1):
        p.box(x, 62, 46, 3, (104, 112, 120))
        p.box(x, 30, 46, 3, (104, 112, 120))
        for k in range(4):
            for shelf in (59, 27):
                kind, at, tint = p.draw.below(3), x - 33 + 22 * k, p.draw.pick(((120, 160, 166), (168, 146, 160), (150, 164, 124), (176, 160, 124)))
                if kind == 0:
                    p.tent(at, shelf - 24, shelf, 9, tint)
                elif kind == 1:
                    p.box(at, shelf - 9, 5, 9, tint, 2)
                else:
                    p.disc(at, shelf - 8, 8, 8, tint)
    p.fill(128 - p.y + 0 * p.x, (116, 126, 134))
    p.fill(134 - p.y + 0 * p.x, (138, 148, 154))
    for x in p.places(16, 0.0):
        p.box(x, 180, 37, 33, (126, 136, 143), 3)
        p.box(x, 158, 10, 2, (96, 104, 112))
    for x in p.places(8, 0.25):
        p.box(x, 108, 17, 13, (84, 92, 100), 3)
        p.box(x, 107, 13, 9, (112, 148, 140))
        p.box(x, 124, 5, 5, (84, 92, 100))


def _desert(p: Painter) -> None:
    p.gradient((196, 160, 150), (228, 200, 168), -24, 92)
    p.disc(420, 40, 18, 18, (232, 212, 170))
    p.disc(1060, 36, 18, 18, (232, 212, 170))
    for x in p.places(7):
        half, top = p.draw.between(30, 52), p.draw.between(52, 68)
        p.tent(x, top - 30, 100, half, (164, 122, 106))
    p.fill(92 + p.wave((4, 8, 0.4), (9, 4, 1.0)) - p.y, (204, 164, 116))
    p.fill(122 + p.wave((3, 12, 2.0), (7, 4, 0.0)) - p.y, (192, 150, 102))
    p.fill(160 + p.wave((4, 9, 1.0)) - p.y, (178, 136, 92))
    for x in p.places(13, 0.3):
        y, size = p.draw.between(106, 128), 0.8 + 0.5 * p.draw.unit()
        green = (96, 122, 88)
        p.box(x, y - 12 * size, 5 * size, 26 * size, green, 5 * size)
        p.box(x - 12 * size, y - 18 * size, 3.6 * size, 11 * size, green, 3.5 * size)
        p.box(x + 12 * size, y - 22 * size, 3.6 * size, 11 * size, green, 3.5 * size)
        p.box(x, y - 10 * size, 13 * size, 3.4 * size, green)
    for x in p.places(24, 0.5):
        p.disc(x, p.draw.between(150, 208), p.draw.between(5, 9), 4, (148, 112, 84))


_PAINTERS = {"meadow": _meadow, "night": _night, "beach": _beach, "laboratory": _laboratory, "desert": _desert}


@functools.lru_cache(maxsize=None)
def strip(setting: str) -> torch.Tensor:
    """The strip of one setting, uint8 [3, 240, 1280]."""
    painter = Painter(setting)
    _PAINTERS[setting](painter)
    return painter.rgb.round().clamp(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=None)
def atlas(device: torch.device) -> torch.Tensor:
    """All strips below each other with the first column repeated at the right, float32 [1, 3, S * 240, 1281] in [-1, 1]."""
    stacked = torch.cat([strip(setting) for setting in SETTINGS], dim=1).float() / 127.5 - 1
    return torch.cat([stacked, stacked[:, :, :1]], dim=2)[None].to(device)
