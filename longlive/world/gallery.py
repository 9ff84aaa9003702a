"""Stories on one page: a row per shot with frames spread over it, the caption above. For looking at, not for judging."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch

from ..core.pixels import to_uint8
from .render import frame_parameters, render
from .story import WorldStory
from .vocabulary import HEIGHT, WIDTH

TEXT_HEIGHT, GAP = 34, 4  # pixels


def shot_strip(story: WorldStory, shot: int, columns: int) -> torch.Tensor:
    """uint8 [H, columns * W, 3]: frames of one shot at equal distances, the first and the last among them."""
    start, stop = story.shot_frames[shot]
    last = stop - start - 1
    picked = [start + round(last * k / max(1, columns - 1)) for k in range(columns)]
    rows = torch.cat([frame_parameters(story, range(f, f + 1)) for f in picked])
    return to_uint8(render(rows)).transpose(0, 1).reshape(HEIGHT, columns * WIDTH, 3)


def gallery(stories: Sequence[WorldStory], columns: int = 6, scale: float = 0.6):
    """A PIL image with all shots of all stories."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = round(columns * WIDTH * scale), round(HEIGHT * scale)
    shots = [(story, index) for story in stories for index in range(len(story.shots))]
    page = Image.new("RGB", (width, len(shots) * (height + TEXT_HEIGHT + GAP)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for row, (story, index) in enumerate(shots):
        top = row * (height + TEXT_HEIGHT + GAP)
        caption = f"{story.seed} shot {index + 1}: {story.shots[index].caption}"
        draw.multiline_text((4, top + 2), "\n".join(textwrap.wrap(caption, width // 7)[:2]), fill="black", font=font, spacing=2)
        strip = Image.fromarray(shot_strip(story, index, columns).numpy()).resize((width, height), Image.Resampling.LANCZOS)
        page.paste(strip, (0, top + TEXT_HEIGHT))
    return page
