"""What a training starts from: weights named in `checkpoints`, never the state of a stopped run (that is `checkpoint.resume`)."""

from __future__ import annotations

import torch

from ..config.root import Config
from ..models.codec import VideoCodec
from ..models.light_vae import read_codec
from ..models.shipped import VAE_FILE, asset
from ..models.spec import model_spec
from ..models.wan_dit import WanDiT
from ..models.wan_vae import WanVAE
from ..models.weights import StateFile, load_into, read_state
from .compiled import channels_last, compiled_pointwise
from .export import STATISTICS


def load_vae(vae: WanVAE, path: str) -> None:
    """Loads a `vae.safetensors` into a VAE of the same sizes; its latent statistics are left out."""
    state = read_state(path, kind="vae")
    tensors = {name: tensor for name, tensor in state.tensors.items() if name not in STATISTICS}
    load_into(vae, StateFile(tensors, state.metadata, state.path), kind="vae")


def load_generator(dit: WanDiT, path: str, *, use_ema: bool) -> None:
    """Loads any generator checkpoint into a network of the same sizes."""
    load_into(dit, path, kind="generator", use_ema=use_ema)


def codec_for_training(config: Config, device: torch.device, dtype: torch.dtype) -> VideoCodec:
    """The frozen VAE that clips are encoded with: `checkpoints.vae_ckpt`, or the one that ships with the model."""
    path = config.checkpoints.vae_ckpt or asset(VAE_FILE)
    codec = read_codec(path, model_spec(config.model_kwargs.model_name).vae, device=device, dtype=dtype)
    codec.vae.requires_grad_(False)
    if config.training.compile:
        codec.vae.pointwise = compiled_pointwise(frozen=True)
    if device.type == "cuda":
        channels_last(codec.vae)
    return codec
