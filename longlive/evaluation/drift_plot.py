"""The curves of drift as a picture: one small panel per figure, seconds from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .contact_sheet import save_png
from .drift import CURVES, SHOWN

COLUMNS, PANEL = 3, (300, 160)  # panels side by side; pixels of one, its title included
MARGIN, TITLE, TEXT_SIZE = 14, 22, 13
TOP_RELATIVE = 2.0  # relative figures are drawn from 0 to 2, or to the largest
INK, FAINT, GRID, LINE = (40, 40, 40), (140, 140, 140), (220, 220, 220), (30, 90, 200)


def plot_curves(rows: Sequence[dict[str, float | None]], output: Path) -> Path:
    """Writes the rows of `drift.curve` as a PNG. Raises InputError when the file cannot be written."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = PANEL
    lines = -(-len(CURVES) // COLUMNS)
    page = Image.new("RGB", (MARGIN + COLUMNS * (width + MARGIN), MARGIN + lines * (height + MARGIN)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT_SIZE)
    for number, name in enumerate(CURVES):
        left = MARGIN + number % COLUMNS * (width + MARGIN)
        top = MARGIN + number // COLUMNS * (height + MARGIN)
        _panel(draw, font, name, [(row["from_second"], row[name]) for row in rows if row[name] is not None], (left, top), rows[-1]["from_second"])
    return save_png(page, output, "give --plot a file in a writable folder with space")


def _panel(draw, font, name: str, points: list[tuple[float, float]], corner: tuple[int, int], last: float) -> None:
    """One figure: a frame with lines at 0, half and the top, and the curve with a dot per window. `last`: where the last window begins."""
    (left, top), (width, height) = corner, PANEL
    most = 1.0 if name in (*SHOWN, "tone") else max([TOP_RELATIVE, *(value for _, value in points)])
    floor, ceiling, right = top + height - 18, top + TITLE, left + width
    ends = f"{points[0][1]:.2f} to {points[-1][1]:.2f}" if points else "not seen"
    draw.text((left, top), f"{name}: {ends}", fill=INK, font=font)
    for share in (0.0, 0.5, 1.0):
        y = floor - share * (floor - ceiling)
        draw.line((left, y, right, y), fill=GRID)
        draw.text((right - 26, y - 14 if share < 1 else y), f"{share * most:.1f}", fill=FAINT, font=font)
    draw.text((left, floor + 1), "0 s", fill=FAINT, font=font)
    draw.text((right - 40, floor + 1), f"{last:.0f} s", fill=FAINT, font=font, anchor="ra")
    places = [(left + 4 + (width - 40) * second / max(last, 1e-9), floor - value / most * (floor - ceiling)) for second, value in points]
    if len(places) > 1:
        draw.line(places, fill=LINE, width=2)
    for x, y in places:
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=LINE)
