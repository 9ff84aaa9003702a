"""A film on one page: a row of evenly spaced frames per shot, with the shot's prompt above it."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InputError
from ..data.videos import decode_frames, probe

MARGIN = 12  # pixels
TEXT_SIZE = 15
LINE_HEIGHT = 20
MAX_LINES = 2


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """One shot: `text` to print and its frames [first, last)."""

    text: str
    first: int
    last: int


def picked_frames(row: SheetRow, columns: int) -> list[int]:
    """`columns` frame indices spread over the shot, each in the middle of its share."""
    length = row.last - row.first
    return [row.first + (2 * i + 1) * length // (2 * columns) for i in range(columns)]


def contact_sheet(video: Path, rows: Sequence[SheetRow], output: Path, columns: int = 5) -> Path:
    """Write the sheet of `video` as a PNG to `output`, in one pass over the film, keeping only the frames shown.

    Raises InputError when a row lies outside the film or the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    frames = probe(video).frames
    outside = [row for row in rows if not 0 <= row.first < row.last <= frames]
    if outside:
        raise InputError(f"frames {outside[0].first} to {outside[0].last} lie outside {video}, which has {frames} frames; give the film's own shots")
    wanted = {index for row in rows for index in picked_frames(row, columns)}
    pictures = {index: picture for index, picture in enumerate(decode_frames(video)) if index in wanted}
    width, height = next(iter(pictures.values())).size
    page_width = MARGIN + columns * (width + MARGIN)
    lines = [_wrapped(row.text, page_width) for row in rows]
    row_heights = [LINE_HEIGHT * len(text) + height + MARGIN for text in lines]
    page = Image.new("RGB", (page_width, MARGIN + sum(row_heights)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT_SIZE)
    top = MARGIN
    for row, text, row_height in zip(rows, lines, row_heights):
        for number, line in enumerate(text):
            draw.text((MARGIN, top + number * LINE_HEIGHT), line, fill="black", font=font)
        for column, index in enumerate(picked_frames(row, columns)):
            page.paste(pictures[index], (MARGIN + column * (width + MARGIN), top + LINE_HEIGHT * len(text)))
        top += row_height
    return save_png(page, output, "give a writable folder with space")


def _wrapped(text: str, page_width: int) -> list[str]:
    """The text in at most MAX_LINES lines of about the page's width, cut with an ellipsis."""
    return textwrap.wrap(" ".join(text.split()), width=max(20, page_width // (TEXT_SIZE // 2)), max_lines=MAX_LINES, placeholder=" ...") or [""]


def save_png(page, output: Path, remedy: str) -> Path:
    """Writes a picture in one piece or not at all. Raises InputError that ends with `remedy`."""
    beside = output.with_name(output.name + ".tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        page.save(beside, format="PNG")
        os.replace(beside, output)
    except OSError as error:
        raise InputError(f"cannot write {output} ({error.strerror or error}); {remedy}") from error
    return output
