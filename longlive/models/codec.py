"""VideoCodec: pixels <-> normalised latents, whole clips or streams.

The one idea: the diffusion model sees latents with zero mean and unit spread per channel; the codec is the VAE plus those constants and nothing else.
Constants come in K rows: K = 1 for Wan2.2, K = 2 where the first latent frame of a stream has statistics of its own (the small model).

Legend: B batch, T pixel frames, F latent frames, C latent channels, H W pixel rows and columns, K rows of constants.
Pixels are [B,3,T,H,W] in [-1,1]; latents [B,F,C,H/16,W/16] float32. Normalisation is done in float32 (spec inference §5.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.pixels import to_uint8
from .spec import VAEDims
from .wan_vae import PAST, VAEState, WanVAE

INDEXABLE = 2**31 - 1
WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip

WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


class CodecState(NamedTuple):
    """Where a stream stands: what the VAE remembers, and how many latent frames have passed."""

    vae: VAEState
    latents: int

    def clone(self) -> "CodecState":
        return CodecState(self.vae.clone(), self.latents)


class VideoCodec:
    """A VAE with the statistics of its latents.

    `mean_KC`, `std_KC` are [K, C] (a plain [C] counts as K = 1). `group` is the number of latent frames per decoder call: small groups stay in the cache of
    a CPU and bound the memory; the result does not depend on it. 0 = all at once, on a GPU as many as its convolutions take in one piece
    (`decoder_frames`), and a stream's first by itself, so that it is seen soon. Groups are used only where gradients are off.
    """

    def __init__(self, vae: WanVAE, mean_KC: Tensor, std_KC: Tensor, *, group: int = 0):
        mean_KC, std_KC = (t.detach().float().reshape(-1, t.shape[-1]) for t in (mean_KC, std_KC))
        if mean_KC.shape != std_KC.shape or mean_KC.shape[0] not in (1, 2) or mean_KC.shape[1] != vae.dims.z_dim:
            raise InputError(f"latent statistics have shapes {list(mean_KC.shape)} and {list(std_KC.shape)}; expected [1 or 2, {vae.dims.z_dim}] for both")
        self.vae, self.group = vae, group
        self.mean_KC, self.std_KC = mean_KC.to(self.device), std_KC.to(self.device)

    @property
    def device(self) -> torch.device:
        return self.vae.conv2.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.conv2.weight.dtype

    def to(self, device=None, dtype: torch.dtype | None = None) -> "VideoCodec":
        """Moves the VAE in place; the statistics stay float32."""
        self.vae.to(device=device, dtype=dtype)
        self.mean_KC, self.std_KC = self.mean_KC.to(self.device), self.std_KC.to(self.device)
        return self

    def _rows(self, constants_KC: Tensor, frames: int, start: bool) -> Tensor:
        """[F or 1, C, 1, 1]: the row for each latent frame; row 0 for the first of a stream, the last row for all others."""
        if constants_KC.shape[0] == 1:
            return constants_KC[:, :, None, None]
        rows = constants_KC[1:].expand(frames, -1)
        return (torch.cat([constants_KC[:1], rows[1:]]) if start else rows)[:, :, None, None]

    def normalise(self, mu_BFCHW: Tensor, *, start: bool = True) -> Tensor:
        """VAE latents -> what the diffusion model sees, float32."""
        frames = mu_BFCHW.shape[1]
        return (mu_BFCHW.float() - self._rows(self.mean_KC, frames, start)) / self._rows(self.std_KC, frames, start)

    def denormalise(self, z_BFCHW: Tensor, *, start: bool = True) -> Tensor:
        frames = z_BFCHW.shape[1]
        return z_BFCHW.to(self.device).float() * self._rows(self.std_KC, frames, start) + self._rows(self.mean_KC, frames, start)

    def encode(self, pixels_BCTHW: Tensor) -> Tensor:
        """A whole clip of 1 + 4k frames -> normalised mean latents [B,1+k,C,h,w]. Raises InputError for other frame counts."""
        mu, _, _ = self.vae.encode(pixels_BCTHW.to(self.device, self.dtype), keep=False)
        return self.normalise(mu.transpose(1, 2))

    def stream_encode(self, state: CodecState | None, pixels_BCTHW: Tensor) -> tuple[CodecState, Tensor]:
        """The next piece of a stream: 1 + 4k frames when `state` is None, else 4k."""
        mu, _, left = self.vae.encode(pixels_BCTHW.to(self.device, self.dtype), None if state is None else state.vae)
        z = self.normalise(mu.transpose(1, 2), start=state is None)
        return CodecState(left, (0 if state is None else state.latents) + z.shape[1]), z

    def decode(self, z_BFCHW: Tensor) -> Tensor:
        """A whole film: normalised latents -> pixels [B,3,1+4(F-1),H,W], not clamped, in the VAE's dtype."""
        if self._step(z_BFCHW) >= z_BFCHW.shape[1]:
            return self.vae.decode(self._to_vae(z_BFCHW, True), keep=False)[0]
        return self.stream_decode(None, z_BFCHW)[1]

    def stream_decode(self, state: CodecState | None, z_BFCHW: Tensor) -> tuple[CodecState, Tensor]:
        """The next latents of a stream -> (state, pixels). Any split of a film into pieces gives the same pixels."""
        pieces = []
        for state, pixels in self.decode_groups(state, z_BFCHW):
            pieces.append(pixels)
        return state, pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)

    def decode_groups(self, state: CodecState | None, z_BFCHW: Tensor) -> Iterator[tuple[CodecState, Tensor]]:
        """Like `stream_decode`, handing out each group of latent frames as soon as it is decoded."""
        return self._groups(self.vae.decode, state, z_BFCHW)

    def byte_groups(self, state: CodecState | None, z_BFCHW: Tensor) -> Iterator[tuple[CodecState, Tensor]]:
        """Like `decode_groups`, as uint8 [B,T,H,W,3]. Each state takes the memory of the one before, which is then void, and so is a stream
        whose decode was interrupted: clone a state that is to be kept."""
        return self._groups(partial(self.vae.decode_bytes, reuse=True), state, z_BFCHW)

    def _groups(self, decode: Callable, state: CodecState | None, z_BFCHW: Tensor) -> Iterator[tuple[CodecState, Tensor]]:
        frames = z_BFCHW.shape[1]
        if frames == 0:
            raise InputError("0 latent frames cannot be decoded; give at least one")
        at, step = 0, self._step(z_BFCHW)
        while at < frames:
            z = z_BFCHW[:, at : at + (1 if state is None and self._automatic else step)]
            at += z.shape[1]
            pixels, left = decode(self._to_vae(z, state is None), None if state is None else state.vae)
            state = CodecState(left, (0 if state is None else state.latents) + z.shape[1])
            yield state, pixels

    @property
    def _automatic(self) -> bool:
        """Whether the number of latent frames per call is the codec's own choice."""
        return self.device.type == "cuda" and not self.group and not torch.is_grad_enabled()

    def _step(self, z_BFCHW: Tensor) -> int:
        """Latent frames per call of the decoder."""
        B, frames, _, H, W = z_BFCHW.shape
        if torch.is_grad_enabled():
            return frames
        if self._automatic:
            return min(frames, decoder_frames(self.vae.dims, B * H * W))
        return min(frames, self.group) or frames

    def _to_vae(self, z_BFCHW: Tensor, start: bool) -> Tensor:
        return self.denormalise(z_BFCHW, start=start).to(self.dtype).transpose(1, 2)

    to_uint8 = staticmethod(to_uint8)  # [B,3,T,H,W] in [-1,1] -> uint8 [B,T,H,W,3]


def decoder_frames(dims: VAEDims, latent_pixels: int) -> int:
    """Most latent frames (at least 1) of `latent_pixels` whose decoding gives no convolution over time 2^31 values or more: beyond, GPUs index in 64 bits."""
    widths = [dims.decoder_base * m for m in (dims.multipliers[-1], *dims.multipliers[::-1])]
    most, time = INDEXABLE, 1
    for stage, width in enumerate(widths[:-1]):
        frame = width * latent_pixels * 4**stage
        most = min(most, (INDEXABLE // frame - PAST) // time)
        time *= 2 if stage < len(dims.temporal_down) and dims.temporal_down[::-1][stage] else 1
    return max(1, most)


def wan22_statistics() -> tuple[Tensor, Tensor]:
    """(mean, std) of Wan2.2 latents, [1, 48] each (spec inference §5.3)."""
    return torch.tensor([WAN22_MEAN]), torch.tensor([WAN22_STD])


def cpu_dtype() -> torch.dtype:
    """The faster dtype of convolutions on this CPU: bfloat16 where the processor multiplies in it, else float32 (bfloat16 without it is 500 times slower).

    A torch that cannot tell what the processor has gets float32, which is right everywhere.
    """
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
