"""VAE files -> a VAE or a codec: the Wan2.2 VAE, and LightVAE, the same graph with pruned widths (spec inference §5.5).

The one idea: a file says its own widths. The full VAE, both LightVAE versions and the small model's VAE are one class, sized from the checkpoint;
the pruning rate is a property of the file, not a setting. A file without encoder weights gives a decoder whose `encode` says so.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from .codec import VideoCodec, wan22_statistics
from .sizes import shapes_of, vae_dims
from .spec import WAN22_VAE, VAEDims, vae_type
from .wan_vae import WanVAE, channels_last
from .weights import StateFile, build_on_meta, load_into, native_state, read_state

STATISTICS = ("latent_mean", "latent_std")
ENCODER_PARTS = ("encoder.", "conv1.")
FULL_WIDTH = WAN22_VAE.decoder_base * WAN22_VAE.multipliers[-1]


def pruning_rate(tensors: dict[str, Tensor]) -> float:
    """1 - (widest decoder channels) / 1024, from tensors under our names, within [0, 0.99]. Raises CheckpointError when there is no decoder."""
    if "decoder.conv1.weight" not in tensors:
        raise CheckpointError("the VAE file has no decoder.conv1.weight, so its width is unknown; check that it is a VAE file")
    return min(0.99, max(0.0, round(1 - tensors["decoder.conv1.weight"].shape[0] / FULL_WIDTH, 6)))


def read_vae(path: str | Path, asked: VAEDims = WAN22_VAE, *, device=None, dtype: torch.dtype | None = None) -> tuple[WanVAE, StateFile]:
    """The VAE in the file at `path` in its own widths, without gradients, and what else the file holds (statistics, metadata).

    `asked` gives what widths do not tell (depths). Native and diffusers-style names, any documented container. Raises CheckpointError.
    """
    state = native_state(read_state(path, kind="vae"), "vae")
    extra = {name: state.tensors.pop(name) for name in STATISTICS if name in state.tensors}
    dims = vae_dims(shapes_of(state.tensors), asked)
    vae = build_on_meta(lambda: WanVAE(dims)).requires_grad_(False).eval()
    if not any(name.startswith(ENCODER_PARTS) for name in state.tensors):
        vae.drop_encoder()
    load_into(vae, state, kind="vae", device=device, dtype=dtype)
    if vae.conv2.weight.is_cuda:
        channels_last(vae)
    return vae, replace(state, tensors=extra)


def read_codec(path: str | Path, asked: VAEDims = WAN22_VAE, *, device=None, dtype: torch.dtype | None = None, group: int = 0) -> VideoCodec:
    """A codec from a VAE file. Latent statistics come from the file (`latent_mean`, `latent_std` [K, C]); without them they are Wan2.2's."""
    vae, extra = read_vae(path, asked, device=device, dtype=dtype)
    present = [name for name in STATISTICS if name in extra.tensors]
    if len(present) == 1:
        raise CheckpointError(f"{path} has {present[0]} but not the other of {' and '.join(STATISTICS)}; save both")
    mean, std = (extra.tensors[name].clone() for name in STATISTICS) if present else wan22_statistics()
    return VideoCodec(vae, mean, std, group=group)


def vae_place(name: str = "wan", root: str | Path = "") -> Path:
    """The documented place below `root` of the VAE that `vae_type` names; the diffusers folder `vae/` beside it where that file is absent."""
    place = Path(root) / vae_type(name).path
    return place.parent / "vae" if not place.exists() and (place.parent / "vae").is_dir() else place
