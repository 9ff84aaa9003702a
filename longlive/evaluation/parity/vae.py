"""Recomputes the recorded VAE passes: encode, decode, streamed decode, and the pruned variant, through the codec that films use.

Legend: B batch, C latent channels, F latent frames, T pixel frames. Recorded latents are [B, C, F, h, w], the codec's [B, F, C, h, w].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.errors import NotAvailable
from ...models.codec import VideoCodec
from ...models.spec import VAEDims
from ...models.wan_vae import WanVAE
from .entries import Entry

SPLIT = "pixels_split"


@torch.no_grad()
def run(entry: Entry) -> dict[str, Tensor]:
    """The wanted outputs of a `vae` file. Refuses, with InputError, a clip whose frame count is not 1 + 4k."""
    vae = WanVAE(dims(entry.config))
    vae.load_state_dict(entry.weights["vae"])
    codec = VideoCodec(vae, entry.inputs["mean"], entry.inputs["std"])
    return {name: _output(name, entry, codec)() for name in entry.wanted}


def dims(config: dict[str, Any]) -> VAEDims:
    """Sizes as recorded: `vae` holds dim and dec_dim, the lists of the full model where they are given, and a pruning rate for the light one."""
    vae = config["vae"]
    if vae.get("attn_scales"):
        raise NotAvailable(f"a VAE with attention at scales {vae['attn_scales']}", "Wan2.2 has attention in the middle only")
    changes: dict[str, Any] = {}
    if "dim_mult" in vae:
        changes["multipliers"] = tuple(vae["dim_mult"])
    if "temperal_downsample" in vae:
        changes["temporal_down"] = tuple(vae["temperal_downsample"])
    if "num_res_blocks" in vae:
        changes |= {"encoder_blocks": vae["num_res_blocks"], "decoder_blocks": vae["num_res_blocks"] + 1}
    full = VAEDims(encoder_base=vae["dim"], decoder_base=vae["dec_dim"], z_dim=vae["z_dim"], **changes)
    return full.pruned(vae.get("pruning_rate", 0.0))


def _output(name: str, entry: Entry, codec: VideoCodec) -> Callable[[], Tensor]:
    """How the output of that name is computed. "pixels" is the decoded whole, "latent" the encoded clip."""
    given = entry.inputs
    if name.startswith(SPLIT):
        return lambda: streamed(codec, given["latent"], entry.config["splits"][int(name.removeprefix(SPLIT))])
    known: dict[str, Callable[[], Tensor]] = {
        "latent": lambda: codec.encode(given["pixels"]).transpose(1, 2),
        "latent_extra": lambda: codec.encode(given["pixels_extra"]).transpose(1, 2),
        "latent_raw": lambda: codec.vae.encode(given["pixels"], keep=False)[0],
        "pixels": lambda: codec.decode(given["latent"].transpose(1, 2)),
        "pixels_whole": lambda: codec.decode(given["latent"].transpose(1, 2)),
        "pixels_first": lambda: codec.decode(given["latent"][:, :, :1].transpose(1, 2)),
    }
    if name not in known:
        raise NotAvailable(f"the VAE output {name!r}", f"known are {', '.join(known)} and {SPLIT}N")
    return known[name]


def streamed(codec: VideoCodec, z_BCFHW: Tensor, sizes: list[int]) -> Tensor:
    """Pixels of consecutive pieces of `sizes` latent frames, decoded as one stream and joined."""
    state, pieces = None, []
    for z in z_BCFHW.split(sizes, 2):
        state, pixels = codec.stream_decode(state, z.transpose(1, 2))
        pieces.append(pixels)
    return torch.cat(pieces, 2)
