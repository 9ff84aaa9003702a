"""The networks of a pipeline, each found, checked and loaded: the generator, the VAE, the text encoder.

Where files belong is documented and lives in `ModelSpec.folder`; the small model's are in the package. Sizes come from the tensors
themselves, so that a model of the same family and another size loads from the same places (`models.sizes`). Every loader returns
(part, path of its weights).
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..core.errors import ConfigError, InputError
from ..core.log import logger
from ..models.codec import VideoCodec, cpu_dtype
from ..models.light_vae import read_codec, vae_place
from ..models.lora import Adapter, add
from ..models.lora_merge import merging
from ..models.packed_state import split_packed, without_weights
from ..models.shipped import VAE_FILE, asset, dit_path
from ..models.sizes import dit_dims, read_model_config, shapes_of
from ..models.spec import ModelSpec, vae_type
from ..models.text import TextEncoder, text_encoder
from ..models.vae_fp8 import decoder_to_fp8
from ..models.vae_tiles import decode_in_tiles
from ..models.wan_dit import WanDiT
from ..models.weights import build_on_meta, load_into, native_state, read_state, refuse_lora_on_merged
from ..ops.triton_available import fp8_tiles_lack
from ..precision.configured import configured_converter
from .adapters import configured_adapters

CPU_GROUP = 2  # latent frames decoded at a time on a CPU, whose cache likes small pieces


def load_dit(config, spec: ModelSpec, device: torch.device, dtype: torch.dtype, adapters: list[tuple[Adapter, float]] | None = None) -> tuple[WanDiT, Path]:
    """The generator of `checkpoints.generator_ckpt`; without one, the small model's shipped weights or the base model's folder.

    `adapters` (default: those that the configuration names) are merged with `merge_lora`, else they stay beside it, live, in `dtype`. With `fp8_quant` or
    `model_quant` linear layers are quantised in between, or taken as the checkpoint holds them. Order: load, merge, convert, live LoRA.
    """
    if config.inference.attention == "fp8":
        _has_fp8_tiles(device, "inference.attention: fp8", "set inference.attention: auto")
    adapters = configured_adapters(config) if adapters is None else adapters
    path = generator_path(config, spec)
    packed, state = split_packed(read_state(path, use_ema=config.inference.use_ema, kind="generator"), named_rule(config))
    converter = configured_converter(config, device, dtype, packed, metadata=state.metadata)
    state = native_state(state, "generator")
    refuse_lora_on_merged(state.metadata, ", ".join(str(adapter.path) for adapter, _ in adapters))
    merge = bool(adapters) and config.merge_lora
    if merge and packed:
        raise ConfigError(f"{path} holds quantised weights, into which no LoRA can be merged; set merge_lora: false, or merge into the bf16 checkpoint")
    shapes = shapes_of(state.tensors) | shapes_of(packed)
    dit = build_on_meta(lambda: WanDiT(dit_dims(shapes, spec.dit, model_config(path, spec))))
    without_weights(dit, packed)
    merged = merging(adapters, spec, shapes, dtype, device) if merge else None
    # what is converted goes to the device layer by layer: the card never holds the whole model in bf16
    load_into(dit, state, kind="generator", device=device if converter is None else "cpu", dtype=dtype, change=merged)
    if converter is not None:
        logger.warning("%s", converter.convert(dit, spec).line())
        dit.to(device)
    for adapter, weight in adapters if not merge else ():
        add(dit, spec, adapter, weight=weight, dtype=dtype)
    return dit.eval().requires_grad_(False), path


def _has_fp8_tiles(device: torch.device, setting: str, instead: str) -> None:
    """Raises ConfigError on a GPU whose FP8 kernels would be emulated, slower than without the setting."""
    reason = fp8_tiles_lack(device) if device.type == "cuda" else None
    if reason is not None:
        raise ConfigError(f"{setting} cannot run on {device}: {reason}; {instead}")


def named_rule(config) -> str | None:
    """The scale rule that the configuration names for weights; None where it is left to the checkpoint."""
    for key in ("model_quant_weight_scale_rule", "model_quant_scale_rule"):
        if config.provenance[f"infra.{key}"] != "default" and config.infra.model_dump()[key] is not None:
            return config.infra.model_dump()[key]
    return None


def generator_path(config, spec: ModelSpec) -> Path:
    """Where the generator's weights are, or should be."""
    if config.checkpoints.generator_ckpt:
        return Path(config.checkpoints.generator_ckpt)
    if not spec.folder:
        return dit_path()
    folder = Path(spec.folder)
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def model_config(path: Path, spec: ModelSpec) -> dict:
    """The config.json beside the weights, else the one in the model's documented folder."""
    return read_model_config(path if path.is_dir() else path.parent) or (read_model_config(Path(spec.folder)) if spec.folder else {})


def load_codec(
    config,
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    folder: Path | None = None,
    path: Path | None = None,
    pruning_rate: float | None = None,
) -> tuple[VideoCodec, Path]:
    """The VAE of `inference.vae_type`. `dtype` None: what the configuration says, and on a CPU the faster of the two.

    `folder` or `path`: a checkpoint elsewhere. `pruning_rate` is checked against the file, which knows its own.
    """
    check_decode(config, device)
    kind, dtype = config.inference.vae_type, dtype or decode_dtype(config, device)
    group = CPU_GROUP if device.type == "cpu" else 0
    if not spec.folder:
        if vae_type(kind).rate:
            raise InputError(f"inference.vae_type = {kind!r} belongs to wan2.2-ti2v-5b; {spec.name} has a VAE of its own, use vae_type: wan")
        found = Path(config.checkpoints.vae_ckpt or asset(VAE_FILE))
    else:
        found = path or (folder / Path(vae_type(kind).path).name if folder else vae_place(kind))
    codec = read_codec(found, spec.vae, device=device, dtype=dtype, group=group)
    decode_as_configured(config, codec)
    if pruning_rate is not None:
        own = round(1 - codec.vae.dims.decoder_base / spec.vae.decoder_base, 6)
        if abs(own - pruning_rate) > 1e-3:
            raise InputError(f"{found} is pruned by {own}, not by {pruning_rate}; leave --lightvae_pruning_rate away, or give the other file")
    return codec, found


def decode_as_configured(config, codec: VideoCodec) -> None:
    """Makes `codec` decode as `inference.vae_fp8` and `inference.vae_tile_rows` say. Raises ConfigError where its device lacks the kernels of FP8."""
    check_decode(config, codec.device)
    if config.inference.vae_fp8:
        decoder_to_fp8(codec.vae)
    if config.inference.vae_tile_rows:
        decode_in_tiles(codec, config.inference.vae_tile_rows)


def check_decode(config, device: torch.device) -> None:
    """Raises ConfigError where `device` lacks the kernels of `inference.vae_fp8`; nothing is read."""
    if config.inference.vae_fp8:
        _has_fp8_tiles(device, "inference.vae_fp8: true", "set inference.vae_fp8: false")


def decode_dtype(config, device: torch.device) -> torch.dtype:
    """Precision of the VAE: as configured; auto is bfloat16 on a GPU, and on a CPU where the processor computes in it."""
    if config.inference.dtype == "float32":
        return torch.float32
    if config.inference.dtype == "bfloat16" or device.type == "cuda":
        return torch.bfloat16
    return cpu_dtype()


def load_text_encoder(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> tuple[TextEncoder, Path | None]:
    """The text encoder behind its cache. The small model's has no weights."""
    if spec.text_kind == "hashed-words":
        return text_encoder(spec), None
    from ..models.umt5 import WEIGHTS

    encoder = text_encoder(spec, device=device, dtype=dtype)
    return encoder, next(path for name in WEIGHTS if (path := Path(spec.folder) / name).exists())
