"""Encoding a clip in pieces on several ranks: each encodes its own latent frames after a halo of earlier ones that it throws away.

The encoder looks only backwards, and only so far: a latent frame depends on a bounded number of earlier ones, so that a rank that starts a little
before its own share gets the latents that the whole clip would give (spec training §5.5). A window that does not begin the clip starts one latent
earlier still: the first frame of any stream is encoded alone, as an image, and that latent is never right in the middle of a film.

Legend: B batch, T pixel frames, F latent frames, C latent channels, H W pixel rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..core.errors import InputError
from ..core.geometry import TEMPORAL_STRIDE, pixel_frames
from ..core.log import warn_once
from .mesh import Mesh


class Encoder(Protocol):
    """What is needed of a video codec: the next piece of a stream to normalised latents [B, F, C, H/16, W/16]."""

    def stream_encode(self, state: Any | None, pixels_BCTHW: torch.Tensor) -> tuple[Any, torch.Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class HaloWindow:
    """What one rank encodes: pixel frames [raw_start, raw_end) of the clip, of whose latents it drops `drop_latents` and keeps [keep_start, keep_end).

    `halo_start` is the first latent that the window can reproduce in part or whole; everything before the kept ones is the halo.
    """

    sp_rank: int
    keep_start: int
    keep_end: int
    halo_start: int
    raw_start: int
    raw_end: int
    drop_latents: int

    @property
    def raw_frames(self) -> int:
        return self.raw_end - self.raw_start

    @property
    def local_latent_frames(self) -> int:
        return self.keep_end - self.keep_start

    def row(self) -> dict[str, int]:
        """The window as the documented table has it."""
        names = ("sp_rank", "keep_start", "keep_end", "halo_start", "raw_start", "raw_end", "drop_latents")
        return {name: vars(self)[name] for name in names} | {"raw_frames": self.raw_frames, "local_latent_frames": self.local_latent_frames}


def halo_windows(latent_frames: int, ranks: int, halo: int, raw_frames: int | None = None) -> list[HaloWindow]:
    """The windows of all ranks for a clip of `latent_frames`. `raw_frames`: pixel frames there are, where the clip ends early.

    Raises InputError for frames that do not divide by the ranks, a negative halo, and a clip that ends before a rank's window begins.
    """
    if ranks < 1 or latent_frames < 1 or latent_frames % ranks:
        rest = f"= {latent_frames % ranks}, not 0" if ranks > 0 else "has no value"
        raise InputError(f"latent frames({latent_frames}) % sequence parallel size({ranks}) {rest}: every rank encodes equally many; change one of them")
    if halo < 0:
        raise InputError(f"vae_halo_latents({halo}) is negative; use 0 or more")
    there = pixel_frames(latent_frames) if raw_frames is None else raw_frames
    own, windows = latent_frames // ranks, []
    for rank in range(ranks):
        keep, stop = rank * own, (rank + 1) * own
        start = max(0, keep - halo)
        raw_start, raw_end = TEMPORAL_STRIDE * max(0, start - 1), min(pixel_frames(stop), there)
        if raw_end <= raw_start:
            equation = f"the clip's {there} frames end before frame {raw_start}"
            raise InputError(f"rank {rank} of {ranks} has nothing to encode: {equation}; {latent_frames} latents need {pixel_frames(latent_frames)} frames")
        drop = keep - start + (start > 0)
        windows.append(HaloWindow(sp_rank=rank, keep_start=keep, keep_end=stop, halo_start=start, raw_start=raw_start, raw_end=raw_end, drop_latents=drop))
    return windows


def encode_window(codec: Encoder, pixels_BCTHW: torch.Tensor, window: HaloWindow, *, group: int = 4) -> torch.Tensor:
    """The kept latents [B, n, C, h, w] of a window from its own pixel frames alone. `group` latents per call bound the memory.

    Raises InputError unless there are `window.raw_frames` frames and they give the kept latents.
    """
    if pixels_BCTHW.shape[2] != window.raw_frames:
        wanted = f"pixel frames [{window.raw_start}, {window.raw_end})"
        raise InputError(f"rank {window.sp_rank} encodes {wanted} = {window.raw_frames}, but was given {pixels_BCTHW.shape[2]}")
    complete = pixel_frames(window.drop_latents + window.local_latent_frames)
    if window.raw_frames != complete:
        kept = f"latents [{window.keep_start}, {window.keep_end})"
        raise InputError(f"{window.raw_frames} frames do not give {kept}: {complete} are needed; the clip is shorter than its latent frames say")
    at, kept = 0, []
    for latents in encode_groups(codec, pixels_BCTHW, group):
        kept.append(latents[:, max(0, window.drop_latents - at) :])
        at += latents.shape[1]
    return torch.cat(kept, dim=1)


def encode_groups(codec: Encoder, pixels_BCTHW: torch.Tensor, group: int = 4) -> Iterator[torch.Tensor]:
    """The latents of a whole clip of 1 + 4k frames, `group` latent frames at a time."""
    state, at, frames = None, 0, pixels_BCTHW.shape[2]
    while at < frames:
        stop = min(at + TEMPORAL_STRIDE * group, frames) if at else min(pixel_frames(group), frames)
        state, latents = codec.stream_encode(state, pixels_BCTHW[:, :, at:stop])
        yield latents
        at = stop


@torch.no_grad()
def halo_encode(codec: Encoder, pixels_BCTHW: torch.Tensor, window: HaloWindow, mesh: Mesh, *, group: int = 4) -> torch.Tensor:
    """Latents [B, F, C, h, w] of the whole clip on every rank that shares it: each encodes its window, then latents are gathered.

    `pixels_BCTHW` are the frames of this rank's window only.
    """
    own = encode_window(codec, pixels_BCTHW, window, group=group)
    return torch.cat(mesh.gather(own).unbind(), dim=1)


def check_halo(halo: int, exact: int) -> None:
    """Says once that a halo below the encoder's reach gives approximate latents."""
    if halo < exact:
        warn_once(f"infra.vae_halo_latents({halo}) < {exact}: latents near the borders of ranks will differ from those of the whole clip; {exact} is exact")
