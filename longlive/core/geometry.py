"""Pixels <-> latents <-> tokens. Every 4, 16 and 880 of the project comes from here.

A video of 1 + 4k pixel frames has 1 + k latent frames: the first pixel frame has a latent of its own, then every four share one.
A latent is 1/16 of the pixels on each side; a token covers 2x2 latent pixels. 704x1280 -> 44x80 latent -> 22x40 = 880 tokens a latent frame.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InputError

FPS = 24
SPATIAL_STRIDE = 16
TEMPORAL_STRIDE = 4
PATCH = 2
CHUNK_FRAMES = 8


@dataclass(frozen=True)
class Geometry:
    """Size of one film. `height`, `width` in pixels, multiples of 32 (VAE stride 16 x patch 2)."""

    height: int
    width: int

    def __post_init__(self):
        step = SPATIAL_STRIDE * PATCH
        for name, value in (("height", self.height), ("width", self.width)):
            if value <= 0 or value % step:
                near = max(step, round(value / step) * step)
                raise InputError(f"{name} {value} is not a multiple of {step} (VAE stride {SPATIAL_STRIDE} x patch {PATCH}); use {near}")

    @classmethod
    def of_latent(cls, latent_height: int, latent_width: int) -> "Geometry":
        return cls(latent_height * SPATIAL_STRIDE, latent_width * SPATIAL_STRIDE)

    @property
    def latent_height(self) -> int:
        return self.height // SPATIAL_STRIDE

    @property
    def latent_width(self) -> int:
        return self.width // SPATIAL_STRIDE

    @property
    def token_height(self) -> int:
        return self.latent_height // PATCH

    @property
    def token_width(self) -> int:
        return self.latent_width // PATCH

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame (880 at 704x1280)."""
        return self.token_height * self.token_width


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames of a film of `latent_frames` latent frames: 1 + 4 (F - 1)."""
    return 1 + TEMPORAL_STRIDE * (latent_frames - 1) if latent_frames else 0


def latent_frames(pixel_frames: int) -> int:
    """Latent frames of a clip of `pixel_frames`; raises InputError unless the count is 1 + 4k."""
    if pixel_frames < 1 or (pixel_frames - 1) % TEMPORAL_STRIDE:
        below = 1 + (max(pixel_frames, 1) - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE
        raise InputError(f"{pixel_frames} frames cannot be encoded: the VAE takes 1 + 4k frames; use {below} or {below + TEMPORAL_STRIDE}")
    return 1 + (pixel_frames - 1) // TEMPORAL_STRIDE


def chunk_pixel_range(chunk: int, chunk_frames: int = CHUNK_FRAMES) -> tuple[int, int]:
    """Half-open range of pixel frames that chunk number `chunk` decodes to. Chunk 0: [0, 29); chunk c: [32c - 3, 32c + 29)."""
    return pixel_frames(chunk * chunk_frames), pixel_frames((chunk + 1) * chunk_frames)
