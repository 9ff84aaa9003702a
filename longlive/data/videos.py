"""Video clips as the model sees them: 24 frames a second, exactly the film's size, in [-1, 1].

Frames are picked by time (frame i of the film is source frame round(i * source_fps / 24)), stretched like images are.
Legend: C channels (RGB), T frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.errors import InputError
from ..core.geometry import FPS, Geometry
from .images import is_image, load_image, one_line, open_rgb, to_pixels

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")


@dataclass(frozen=True)
class ClipInfo:
    """`frames` in the file, how many of them are shown in a second, and their size in pixels (0: not known)."""

    frames: int
    fps: float
    width: int = 0
    height: int = 0


def is_video(path: Path) -> bool:
    """Whether the file name says that this is a video, in either letter case."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def clip_order(stem: str) -> tuple:
    """Sort key of the clips of a folder: numbers by value, then words by name (spec training §2.2)."""
    return (0, int(stem), stem) if stem.isdecimal() else (1, 0, stem)


def open_video(path: str | Path):
    """The PyAV container of a file with pictures. Raises InputError for anything else."""
    import av

    try:
        container = av.open(str(path))
    except FileNotFoundError:
        raise InputError(f"video {path} does not exist; give the path of a {'/'.join(s[1:] for s in VIDEO_SUFFIXES)} file") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable video ({one_line(error)}); give a mp4, mov, mkv, webm or avi file") from None
    if not container.streams.video:
        container.close()
        raise InputError(f"{path} holds no video stream; give a file with pictures")
    return container


def probe(path: str | Path) -> ClipInfo:
    """Frame count, rate and size of a clip. Counts packets where the container does not tell. Raises InputError."""
    import av

    with open_video(path) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or stream.guessed_rate or FPS)
        size = stream.codec_context.width, stream.codec_context.height
        try:
            frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise damaged(path, error) from None
    if frames < 1:
        raise InputError(f"video {path} has no frames; give a clip with at least one")
    return ClipInfo(frames, fps, *size)


def damaged(path: str | Path, error: BaseException) -> InputError:
    """What a user reads when the video library gives up inside a file."""
    return InputError(f"video {path} is damaged ({one_line(error)}); give a file that plays to its end")


def decode_frames(path: str | Path) -> Iterator:
    """Every frame of the clip as an RGB PIL image, in order. Raises InputError on a damaged file."""
    import av

    with open_video(path) as container:
        try:
            for frame in container.decode(video=0):
                yield frame.to_image()
        except (av.FFmpegError, OSError, ValueError) as error:
            raise damaged(path, error) from None


def check_start(path: str | Path, *, clip: bool = False) -> None:
    """Raises InputError unless `path` is an image, or a clip whose first frame can be seen. `clip`: it must be one."""
    if not clip and not is_video(Path(path)):
        open_rgb(path)
    elif probe(path).frames and next(decode_frames(path), None) is None:
        raise InputError(f"video {path} has no frames; give a clip with at least one")


def first_frame(path: str | Path, geometry: Geometry) -> torch.Tensor:
    """First frame of an image or of a clip: float32 [3, height, width] in [-1, 1]."""
    if is_image(Path(path)) or not is_video(Path(path)):
        return load_image(path, geometry)
    for image in decode_frames(path):
        return to_pixels(image, geometry)
    raise InputError(f"video {path} has no frames; give a clip with at least one")


def clip_frames(path: str | Path, geometry: Geometry, max_frames: int | None = None) -> Iterator[torch.Tensor]:
    """The clip at 24 fps, frame by frame: float32 [3, height, width] in [-1, 1], at most `max_frames` of them."""
    fps, count, wanted = probe(path).fps, 0, 0
    for index, image in enumerate(decode_frames(path)):
        pixels = to_pixels(image, geometry) if wanted <= index else None
        while wanted <= index:
            if max_frames is not None and count >= max_frames:
                return
            yield pixels
            count += 1
            wanted = round(count * fps / FPS)


def load_clip(path: str | Path, geometry: Geometry, max_frames: int | None = None) -> torch.Tensor:
    """The clip at 24 fps as one tensor: float32 [3, T, height, width] in [-1, 1]. Memory grows with T."""
    pixels = list(clip_frames(path, geometry, max_frames))
    if not pixels:
        raise InputError(f"video {path} has no frames; give a clip with at least one")
    return torch.stack(pixels, dim=1)
