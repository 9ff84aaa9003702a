"""Weights for use: safetensors files in pieces small enough to ship, and one file in a published container from any checkpoint.

While it trains a generator is written twice: `dit-0000i-of-0000n.safetensors`, bfloat16, the EMA where there is one, ready to ship; and
`raw-0000i-of-0000n.safetensors`, float32, the trained weights themselves, for a later leg to start from. Pieces are small where all of it is.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..core.errors import CheckpointError, InputError
from ..core.log import launch_rank
from ..models.wan_vae import WanVAE
from ..models.files import locate, open_file
from ..models.weights import merge_record, native_state, read_state, save_state
from ..parallel.fsdp import whole
from .checkpoint import folders

SHARD_BYTES = 15 * 2**20
LARGE, LARGE_SHARD_BYTES = 2**30, 4 * 2**30
VAE_FILE = "vae.safetensors"
STATISTICS = ("latent_mean", "latent_std")


def shards(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The tensors in order, cut into groups of at most SHARD_BYTES, of LARGE_SHARD_BYTES from LARGE bytes on (a larger tensor is a group of its own)."""
    limit = SHARD_BYTES if sum(t.nbytes for t in tensors.values()) < LARGE else LARGE_SHARD_BYTES
    groups: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
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


def export_checkpoint(source: Path, out: Path, *, use_ema: bool, container: str, dtype: torch.dtype) -> dict[str, str]:
    """Writes the generator of any checkpoint (one of a training run, its LOGDIR, or a weight file) as one file; returns what is said in it.

    `container` "pt": {"generator": tensors under the published names, ...} (spec inference §10.1); "safetensors": the tensors under the names of the
    network, and the rest as metadata. `use_ema`: the average's weights. Raises CheckpointError for a source without them, InputError for a file that exists.
    """
    if out.exists():
        raise InputError(f"{out} exists; name another file, or remove it")
    place = (folders(source) or [source])[-1]
    state = native_state(read_state(place, use_ema=use_ema, kind="generator"), "generator")
    if use_ema and not has_average(place):
        raise CheckpointError(f"{place} holds no average of weights (training.ema_weight was 0, or it is a weight file); leave --ema out")
    about = {key: str(state.metadata[key]) for key in ("step", "trainer") if key in state.metadata}
    about |= merge_record(state.metadata) | {"weights": "ema" if use_ema else "raw", "dtype": str(dtype).removeprefix("torch.")}
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.tensors.items()}
    if container == "safetensors":
        save_state(out, tensors, about)
    else:
        save_container(out, {"generator": {f"model.{name}": tensor for name, tensor in tensors.items()}, **about})
    return about


def has_average(place: Path) -> bool:
    """Whether a checkpoint has an entry of its own for the EMA."""
    return any("generator_ema" in open_file(file)[0] for file in locate(place))


def save_container(out: Path, content: dict) -> None:
    """torch.save that appears whole or not at all. Raises InputError where it cannot be written."""
    partial = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, partial)
        os.replace(partial, out)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{out} cannot be written ({str(error).splitlines()[0]}); check the folder and the free space") from None
    finally:
        partial.unlink(missing_ok=True)
