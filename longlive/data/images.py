"""Images as the model sees them: RGB, resized to exactly the film's size, in [-1, 1].

The resize stretches: no crop, no preserved aspect (spec inference §8); antialiased bilinear on floats, as the models were conditioned.
Legend: C channels (RGB), H, W pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..core.errors import InputError
from ..core.geometry import Geometry

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def is_image(path: Path) -> bool:
    """Whether the file name says that this is an image, in either letter case."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def open_rgb(path: str | Path):
    """The image at `path` as an RGB PIL image. Raises InputError where it is missing or no image."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist; give the path of a {'/'.join(s[1:] for s in IMAGE_SUFFIXES)} file") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a readable image ({one_line(error)}); give a png, jpg, webp or bmp file") from None


def one_line(error: BaseException) -> str:
    """The message of a foreign error, without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def to_pixels(image, geometry: Geometry) -> torch.Tensor:
    """A PIL image -> float32 pixels [3, height, width] in [-1, 1], stretched to exactly the film's size."""
    pixels_CHW = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255.0
    size = (geometry.height, geometry.width)
    if tuple(pixels_CHW.shape[1:]) != size:
        pixels_CHW = F.interpolate(pixels_CHW[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)
    return pixels_CHW * 2.0 - 1.0


def load_image(path: str | Path, geometry: Geometry) -> torch.Tensor:
    """The image file at `path` as float32 pixels [3, height, width] in [-1, 1]."""
    return to_pixels(open_rgb(path), geometry)
