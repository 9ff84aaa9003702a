"""Pictures that are given: the image a film or a shot starts from, or the clip that a film goes on from.

All become known latent frames at the head of a chunk. The film's first frame is encoded alone, as the VAE does; an image inside a film
is encoded as one latent frame of a standing picture, which is what its place in the stream means.

Legend: B batch, K known latent frames, C latent channels, T pixel frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..core.errors import InputError
from ..core.geometry import TEMPORAL_STRIDE
from ..core.story import ChunkPlan, Shot, Storyboard
from ..data.videos import clip_frames, first_frame
from ..diffusion.known import KnownFrames

PIECE = 32  # pixel frames encoded at a time, after the first one


class Conditioning:
    """What each film of a batch is given. Films of one batch must be given frames at the same places."""

    def __init__(self, pipeline, storyboards: tuple[Storyboard, ...], samples: int, max_frames: int):
        """`max_frames`: at most so many pixel frames of a given clip are read."""
        self.pipeline, self.samples = pipeline, samples
        self.images = {(film, number): shot.image for film, board in enumerate(storyboards) for number, shot in enumerate(board.shots)}
        starts = [self._start(board, max_frames) for board in storyboards]
        counts = {0 if z is None else z.shape[1] for z in starts}
        if len(counts) > 1:
            raise InputError("some films of the batch start from given frames and some do not, or from clips of other lengths; make them one by one")
        self.extension_frames = counts.pop()
        self.start = KnownFrames(self._batch(starts)) if self.extension_frames else None

    def add_shot(self, film: int, number: int, shot: Shot) -> None:
        self.images[film, number] = shot.image

    def check(self, films: Sequence[Sequence[ChunkPlan]]) -> None:
        """Raises InputError where the planned `films` cannot be given what they ask for."""
        for chunk, plans in enumerate(zip(*films)):
            self._images(chunk, plans)

    def of_chunk(self, chunk: int, films: Sequence[ChunkPlan]) -> KnownFrames | None:
        """Known frames for the rollout's next chunk, or None. `films`: what each film shows there."""
        paths, start = self._images(chunk, films), chunk * self.pipeline.settings.chunk_frames
        if paths:
            return KnownFrames(self._batch([self._standing(path) for path in paths]), start)
        return self.start if start < self.extension_frames else None

    def _images(self, chunk: int, films: Sequence[ChunkPlan]) -> list[str]:
        """The image that each film begins a shot with at this chunk; empty where none does."""
        paths = [self.images[film, plan.shot] if plan.cut else None for film, plan in enumerate(films)]
        given = [path for path in paths if path is not None]
        if given and len(given) < len(paths):
            raise InputError(f"at chunk {chunk} some films of the batch begin with an image and some do not; make them one by one")
        if given and chunk * self.pipeline.settings.chunk_frames < self.extension_frames:
            raise InputError(f"{given[0]} begins a shot at chunk {chunk}, where the given clip still runs; let the shot before it last longer")
        return given

    def _start(self, board: Storyboard, max_frames: int) -> torch.Tensor | None:
        """Latents [1, K, C, h, w] that the film begins with."""
        starts = [path for path in (board.video, board.image, board.shots[0].image) if path]
        if len(starts) > 1:
            raise InputError(f"a film that starts from {' and '.join(starts)}; give it one start")
        if board.video:
            return self._encode_clip(clip_frames(board.video, self.pipeline.geometry, max_frames))
        path = starts[0] if starts else None
        return None if path is None else self._encode(first_frame(path, self.pipeline.geometry)[:, None])

    def _standing(self, path: str) -> torch.Tensor:
        picture = first_frame(path, self.pipeline.geometry)[:, None]
        return self._encode(picture.expand(-1, 1 + TEMPORAL_STRIDE, -1, -1))[:, 1:]

    @torch.no_grad()
    def _encode(self, pixels_CTHW: torch.Tensor) -> torch.Tensor:
        return self.pipeline.codec.encode(pixels_CTHW[None]).to(self.pipeline.device, torch.float32)

    @torch.no_grad()
    def _encode_clip(self, frames: Iterable[torch.Tensor]) -> torch.Tensor:
        """The latents of a clip, a piece at a time, so that only latents add up. Last frames that do not fill a latent frame are left out."""
        state, parts, piece = None, [], []
        for frame in frames:
            piece.append(frame)
            if len(piece) == (PIECE if state else PIECE + 1):
                state, z = self.pipeline.codec.stream_encode(state, torch.stack(piece, dim=1)[None])
                parts.append(z)
                piece = []
        first = 0 if state else 1
        whole = first + (len(piece) - first) // TEMPORAL_STRIDE * TEMPORAL_STRIDE if len(piece) >= first else 0
        if whole:
            parts.append(self.pipeline.codec.stream_encode(state, torch.stack(piece[:whole], dim=1)[None])[1])
        if not parts:
            raise InputError("the given clip has no frames; give one that plays")
        return torch.cat(parts, dim=1).to(self.pipeline.device, torch.float32)

    def _batch(self, films: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(films).repeat_interleave(self.samples, dim=0)
