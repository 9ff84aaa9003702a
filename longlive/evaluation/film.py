"""One film against its storyboard: what the judge reads in the video file, and where each shot lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..data.videos import decode_frames
from ..world.judge import Judge, score_film
from ..world.story import WorldStory
from .contact_sheet import SheetRow


def video_frames(video: Path) -> torch.Tensor:
    """Every frame of the file, uint8 [T, H, W, 3]. Memory grows with the film: 11 MB per second at 192x320 and 24 frames a second."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in decode_frames(video)]))


def judge_film(video: Path, story: WorldStory, judge: Judge) -> dict[str, float]:
    """The seven scores, each 0..1, of the film in `video` as a film of `story`. Attributes are read at the story's own shots, cuts are not."""
    return score_film(judge.read(video_frames(video), story.shot_starts), story)


def sheet_rows(story: WorldStory) -> list[SheetRow]:
    """One row per shot for `contact_sheet`."""
    return [SheetRow(text=shot.caption, first=first, last=last) for shot, (first, last) in zip(story.shots, story.shot_frames)]
