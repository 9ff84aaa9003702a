"""Pictures that are given: the image a film or a shot starts from, or the clip that a film goes on from.

All become known latent frames at the head of a chunk. The film's first frame is encoded alone, as the VAE does; an image inside a film
is encoded as one latent frame of a standing picture, which is what its place in the stream means.

Legend: B batch, K known latent frames, C latent channels, T pixel frames.
"""

from __future__ import annotations

import torch

from ..core.errors import InputError
from ..core.geometry import TEMPORAL_STRIDE
from ..core.story import ChunkPlan, Shot, Storyboard
from ..data.videos import first_frame, load_clip
from ..diffusion.known import KnownFrames


class Here(KnownFrames):
    """Known frames at the head of the chunk at hand, wherever in the film that is."""

    def part(self, start: int, frames: int) -> KnownFrames:
        return KnownFrames(self.z_BFCHW[:, :frames])


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

    def of_chunk(self, chunk: int, plans_B: tuple[ChunkPlan, ...]) -> KnownFrames | None:
        """Known frames for the rollout's next chunk, or None."""
        frames = self.pipeline.settings.chunk_frames
        if self.start is not None and chunk * frames < self.start.frames:
            return self.start
        paths = [self.images[film, p.shot] if p.cut else None for film, p in enumerate(plans_B[:: self.samples])]
        if not any(paths):
            return None
        if not all(paths):
            raise InputError(f"at chunk {chunk} some films of the batch begin with an image and some do not; make them one by one")
        return Here(self._batch([self._standing(path) for path in paths]))

    def _start(self, board: Storyboard, max_frames: int) -> torch.Tensor | None:
        """Latents [1, K, C, h, w] that the film begins with."""
        if board.video:
            return self._encode(whole_clip(load_clip(board.video, self.pipeline.geometry, max_frames)))
        path = board.image or board.shots[0].image
        return None if path is None else self._encode(first_frame(path, self.pipeline.geometry)[:, None])

    def _standing(self, path: str) -> torch.Tensor:
        picture = first_frame(path, self.pipeline.geometry)[:, None]
        return self._encode(picture.expand(-1, 1 + TEMPORAL_STRIDE, -1, -1))[:, 1:]

    @torch.no_grad()
    def _encode(self, pixels_CTHW: torch.Tensor) -> torch.Tensor:
        return self.pipeline.codec.encode(pixels_CTHW[None]).to(self.pipeline.device, torch.float32)

    def _batch(self, films: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(films).repeat_interleave(self.samples, dim=0)


def whole_clip(pixels_CTHW: torch.Tensor) -> torch.Tensor:
    """The clip without the last frames that do not fill a latent frame: 1 + 4k frames remain."""
    return pixels_CTHW[:, : 1 + (pixels_CTHW.shape[1] - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE]
