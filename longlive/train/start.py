"""What a training starts from: weights named in `checkpoints`, never the state of a stopped run (that is `checkpoint.resume`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..config.root import Config
from ..engine.parts import generator_path, model_config
from ..models.codec import VideoCodec
from ..models.light_vae import read_codec, vae_place
from ..models.shipped import VAE_FILE, asset
from ..models.sizes import dit_dims, shapes_of
from ..models.spec import ModelSpec, model_spec
from ..models.wan_dit import WanDiT
from ..models.wan_vae import WanVAE
from ..models.weights import StateFile, build_on_meta, load_into, merge_record, native_state, read_state
from .compiled import channels_last, compiled_pointwise
from .export import STATISTICS


def load_vae(vae: WanVAE, path: str) -> None:
    """Loads a `vae.safetensors` into a VAE of the same sizes; its latent statistics are left out."""
    state = read_state(path, kind="vae")
    tensors = {name: tensor for name, tensor in state.tensors.items() if name not in STATISTICS}
    load_into(vae, StateFile(tensors, state.metadata, state.path), kind="vae")


def starting_generator(config: Config, spec: ModelSpec, device: torch.device) -> tuple[WanDiT, dict[str, Any]]:
    """(the network to train, what is merged into it). `checkpoints.generator_ckpt`, else the base model, else (the small model) fresh weights.

    The network is float32 on `device`; sizes come from the file, as in generation. What is merged (`weights.merge_record`) holds for all weights
    that come of it, so that they too refuse a LoRA. Raises CheckpointError that names the file that is missing or does not fit.
    """
    path = config.checkpoints.generator_ckpt
    if path is None and not spec.folder:
        torch.manual_seed(config.logging.seed)
        return WanDiT(spec.dit).to(device), {}
    place = generator_path(config, spec)
    state = native_state(read_state(place, use_ema=config.inference.use_ema, kind="generator"), "generator")
    dims = dit_dims(shapes_of(state.tensors), spec.dit, model_config(place, spec)) if spec.folder else spec.dit
    dit = build_on_meta(lambda: WanDiT(dims)).to_empty(device=device)  # memory of its own: a mapped file cannot be trained
    load_into(dit, state, kind="generator")
    return dit, merge_record(state.metadata)


def training_vae(config: Config, spec: ModelSpec) -> Path:
    """Where the VAE that clips are encoded with is, or should be: `checkpoints.vae_ckpt`, or the model's own."""
    return Path(config.checkpoints.vae_ckpt or (vae_place() if spec.folder else asset(VAE_FILE)))


def codec_for_training(config: Config, device: torch.device, dtype: torch.dtype) -> VideoCodec:
    """The frozen VAE of `training_vae`."""
    spec = model_spec(config.model_kwargs.model_name)
    codec = read_codec(training_vae(config, spec), spec.vae, device=device, dtype=dtype)
    codec.vae.requires_grad_(False)
    if config.training.compile:
        codec.vae.pointwise = compiled_pointwise(frozen=True)
    if device.type == "cuda":
        channels_last(codec.vae)
    return codec
