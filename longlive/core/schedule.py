"""Latent frames -> chunks, the unit of autoregression."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InputError
from .story import MOST_CHUNKS


@dataclass(frozen=True)
class Chunk:
    """`index`-th chunk: latent frames [start, start + frames)."""

    index: int
    start: int
    frames: int


def chunk_schedule(latent_frames: int, chunk_frames: int) -> tuple[Chunk, ...]:
    """Splits `latent_frames` into equal chunks. Raises InputError with the equation when they do not divide."""
    if chunk_frames < 1 or latent_frames < 1 or latent_frames % chunk_frames:
        near = max(1, round(latent_frames / max(chunk_frames, 1))) * max(chunk_frames, 1)
        raise InputError(
            f"num_output_frames({latent_frames}) % num_frame_per_block({chunk_frames}) != 0: "
            f"a film is whole chunks; use {near} latent frames"
        )
    chunks = latent_frames // chunk_frames
    if chunks > MOST_CHUNKS:
        raise InputError(f"num_output_frames({latent_frames}) is {chunks} chunks; a film has at most {MOST_CHUNKS}, give a smaller number")
    return tuple(Chunk(i, i * chunk_frames, chunk_frames) for i in range(chunks))
