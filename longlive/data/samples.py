"""What the trainer is handed: a batch of streams of whole chunks, as bytes or as latents, with everything that is known about each chunk.

Legend: B batch, T pixel frames, F latent frames, c chunks, C latent channels, H W rows and columns (pixels of frames, latents of latents).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.geometry import latent_frames


@dataclass(frozen=True)
class Broken:
    """A clip that could not be read when its turn came: the file, why, and which sample wanted it."""

    file: str
    reason: str
    number: int


@dataclass(frozen=True, kw_only=True)
class VideoSample:
    """One stream. `frames_THW3` uint8 or `latents_FCHW` (one of the two); prompt and cut flag per chunk; `valid_chunks` of them are not padding.

    `name` says what was drawn, for messages: folder, clip and start frame. Both lengths are those of all chunks, padding included.
    """

    number: int
    name: str
    prompts: tuple[str, ...]
    cuts: tuple[bool, ...]
    valid_chunks: int
    frames_THW3: Tensor | None = None
    latents_FCHW: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class VideoBatch:
    """`frames_BTHW3` uint8 or `latents_BFCHW` float32; per sample its prompts and cut flags by chunk, its valid chunks, its name and number.

    `i2v`: the first latent frame of every sample is given to the model, not learned. `broken`: the clips that were skipped on the way here.
    Like `LatentBatch` it offers `latents_BFCHW` and `cuts`; beyond it the prompts themselves and the masks of padding.
    """

    prompts: tuple[tuple[str, ...], ...]
    cuts: tuple[tuple[bool, ...], ...]
    valid_chunks: tuple[int, ...]
    names: tuple[str, ...]
    numbers: tuple[int, ...]
    i2v: bool = False
    broken: tuple[Broken, ...] = ()
    frames_BTHW3: Tensor | None = None
    latents_BFCHW: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cuts)

    @property
    def chunks(self) -> int:
        return len(self.cuts[0])

    @property
    def latent_frames(self) -> int:
        """F, padding included."""
        return self.latents_BFCHW.shape[1] if self.latents_BFCHW is not None else latent_frames(self.frames_BTHW3.shape[1])

    @property
    def valid_latents(self) -> tuple[int, ...]:
        """Latent frames of each sample that are not padding."""
        return tuple(count * (self.latent_frames // self.chunks) for count in self.valid_chunks)

    def chunk_mask_Bc(self, device: torch.device | str = "cpu") -> Tensor:
        """float32 [B, c]: 1 for chunks of the clip, 0 for padding."""
        valid = torch.tensor(self.valid_chunks)[:, None]
        return (torch.arange(self.chunks) < valid).float().to(device, non_blocking=True)

    def mask_BF(self, device: torch.device | str = "cpu") -> Tensor:
        """float32 [B, F]: 1 for latent frames of the clip, 0 for padding (spec training §3.4)."""
        return self.chunk_mask_Bc(device).repeat_interleave(self.latent_frames // self.chunks, dim=1)

    def first_pixels_B3HW(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """The given first frame of every sample, in [-1, 1]; for samples that come as frames."""
        return to_pixels(self.frames_BTHW3[:, :1], device, dtype)[:, :, 0]

    def with_latents(self, latents_BFCHW: Tensor) -> "VideoBatch":
        """The same samples as latents; the frames are let go."""
        return replace(self, frames_BTHW3=None, latents_BFCHW=latents_BFCHW)

    def to(self, device: torch.device | str) -> "VideoBatch":
        """The tensor on `device`; copied while the host goes on where it is pinned."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def pin_memory(self) -> "VideoBatch":
        """The tensor in page-locked memory (called by torch's loader)."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def part(self, index: int) -> "VideoBatch":
        """Sample `index` alone, as a batch of one."""
        lists = {name: value[index : index + 1] for name, value in vars(self).items() if isinstance(value, tuple) and name != "broken"}
        return replace(self, **lists, **{name: tensor[index : index + 1] for name, tensor in self._tensors().items()}, broken=())

    def _tensors(self) -> dict[str, Tensor]:
        both = {"frames_BTHW3": self.frames_BTHW3, "latents_BFCHW": self.latents_BFCHW}
        return {name: tensor for name, tensor in both.items() if tensor is not None}


def collate(samples: Sequence[VideoSample], broken: Sequence[Broken] = (), *, i2v: bool = False) -> VideoBatch:
    """Samples of one length into a batch."""
    frames, latents = (None if getattr(samples[0], name) is None else torch.stack([getattr(s, name) for s in samples]) for name in _STACKED)
    lists = {field: tuple(getattr(s, one) for s in samples) for one, field in _LISTED.items()}
    return VideoBatch(**lists, i2v=i2v, broken=tuple(broken), frames_BTHW3=frames, latents_BFCHW=latents)


_STACKED = ("frames_THW3", "latents_FCHW")
_LISTED = {"prompts": "prompts", "cuts": "cuts", "valid_chunks": "valid_chunks", "name": "names", "number": "numbers"}


def to_pixels(frames_BTHW3: Tensor, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, T, H, W, 3] -> [B, 3, T, H, W] in [-1, 1]: bytes travel, the device computes ((x / 255 - 0.5) / 0.5)."""
    frames = frames_BTHW3.to(device, non_blocking=True)
    return frames.movedim(-1, 1).to(torch.float32).div_(127.5).sub_(1).to(dtype)
