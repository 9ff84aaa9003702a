"""Weights for use: safetensors files in pieces small enough to ship.

A generator is written twice: `dit-0000i-of-0000n.safetensors`, bfloat16, the EMA where there is one, ready to ship; and
`raw-0000i-of-0000n.safetensors`, float32, the trained weights themselves, for a later leg to start from.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..core.log import launch_rank
from ..models.wan_vae import WanVAE
from ..models.weights import save_state
from ..parallel.fsdp import whole

SHARD_BYTES = 15 * 2**20
VAE_FILE = "vae.safetensors"
STATISTICS = ("latent_mean", "latent_std")


def shards(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The tensors in order, cut into groups of at most SHARD_BYTES (a larger tensor is a group of its own)."""
    groups: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > SHARD_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups


def write_shards(folder: Path, stem: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> list[Path]:
    """Writes `stem-0000i-of-0000n.safetensors`."""
    groups = shards(tensors)
    paths = [folder / f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for path, group in zip(paths, groups):
        save_state(path, group, metadata)
    return paths


def save_generator(folder: Path, raw: dict[str, torch.Tensor], ema: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes both forms. Sharded tensors are gathered one by one: then every rank must call it, and the first writes."""
    for stem, tensors, dtype in (("raw", raw, torch.float32), ("dit", ema or raw, torch.bfloat16)):
        first = launch_rank()[0] == 0
        gathered = {name: on_host for name, t in tensors.items() if (on_host := _on_host(t, dtype, first)) is not None}
        if first:
            write_shards(folder, stem, gathered, metadata)


def _on_host(tensor: torch.Tensor, dtype: torch.dtype, keep: bool) -> torch.Tensor | None:
    tensor = whole(tensor.detach())
    return tensor.to(dtype).cpu() if keep else None


def save_vae(folder: Path, vae: WanVAE, mean_KC: torch.Tensor, std_KC: torch.Tensor, metadata: dict[str, str]) -> None:
    """`vae.safetensors`: weights in bfloat16, `latent_mean` and `latent_std` [K, C] in float32; the sizes are in the metadata."""
    tensors = {name: t.to(torch.bfloat16) for name, t in vae.state_dict().items()}
    sizes = {"encoder_base": str(vae.dims.encoder_base), "decoder_base": str(vae.dims.decoder_base)}
    save_state(folder / VAE_FILE, {**tensors, **dict(zip(STATISTICS, (mean_KC.float(), std_KC.float())))}, {**metadata, **sizes})
