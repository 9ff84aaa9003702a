"""The networks of a measured film: random weights in the sizes of a model, filled on the device, or those of a checkpoint.

Random networks never pass through the host, and no matrix is zero, since products of zeros are faster. Precisions are words: `PRECISIONS` gives each the
configuration keys of a checkpoint's run, and what it does to random weights.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..core.errors import InputError
from ..core.geometry import CHUNK_FRAMES, Geometry
from ..engine.pipeline import Pipeline
from ..engine.rollout import RolloutSettings
from ..models.codec import VideoCodec, wan22_statistics
from ..models.joint import join_projections
from ..models.spec import ModelSpec, VAEDims, model_spec, vae_type
from ..models.vae_fp8 import decoder_to_fp8
from ..models.vae_tiles import decode_in_tiles
from ..models.wan_dit import WanDiT
from ..models.wan_vae import WanVAE, channels_last
from ..models.weights import build_on_meta
from ..ops.kv_formats import FORMATS
from ..parallel.mesh import Mesh
from ..precision.backends import EMULATED, FP8, NATIVE, W4A8, W4A16, choose
from ..precision.capability import probe
from ..precision.converter import LinearConverter, Selection

VAE_NAMES = {"wan": "wan", "lightvae_v1": "mg_lightvae", "lightvae_v2": "mg_lightvae_v2"}  # short names -> values of `vae_type`
SHARE = 0.02  # spread of the random weights of the generator


@dataclass(frozen=True)
class Precision:
    """`dtype` of the generator's tensors, the dotted `overrides` of a configuration, and what `convert(dit, spec)` does to a generator of random weights.

    `kv`: format of the keys and values of finished chunks, None = as they are.
    """

    dtype: torch.dtype
    overrides: tuple[str, ...] = ()
    convert: Callable[[WanDiT, ModelSpec], None] | None = None
    kv: str | None = None


def _quantised(name: str) -> Precision:
    """Linear layers computed by a backend of `precision.backends`; everything else bfloat16."""

    def convert(dit: WanDiT, spec: ModelSpec) -> None:
        device = next(dit.parameters()).device
        backend = choose(name, "--precision", (name,), name, probe(device))
        LinearConverter(backend=backend, selection=Selection(), device=device).convert(dit, spec)

    switch = "fp8_quant=true" if name == FP8 else "infra.model_quant=true"
    key = "fp8_backend" if name == FP8 else "infra.model_quant_backend"
    return Precision(torch.bfloat16, ("inference.dtype=bfloat16", switch, f"{key}={name}"), convert)


PRECISIONS = {
    "float32": Precision(torch.float32, ("inference.dtype=float32",)),
    "bf16": Precision(torch.bfloat16, ("inference.dtype=bfloat16",)),
    **{name: _quantised(name) for name in (FP8, W4A8, W4A16, NATIVE, EMULATED)},
}


def precision(name: str) -> Precision:
    """The entry of `PRECISIONS`; "fp8+int8" is fp8 with pages in int8. Raises InputError that lists the names."""
    name, plus, kv = name.partition("+")
    if name not in PRECISIONS or (plus and kv not in FORMATS):
        raise InputError(f"--precision {name + plus + kv!r} is none of {', '.join(PRECISIONS)}, alone or with + and one of {', '.join(FORMATS)} for the pages")
    found = PRECISIONS[name]
    return replace(found, kv=kv, overrides=(*found.overrides, "inference.kv_quant=true", f"inference.kv_quant_format={kv}")) if plus else found


def vae_kind(name: str, *others: str) -> tuple[str, bool]:
    """(the value of `vae_type` behind `name`, whether its decoder is in FP8: "wan+fp8"). Raises InputError that lists the names, and `others` of the caller."""
    kind, plus, format = name.partition("+")
    if kind not in VAE_NAMES or (plus and format != FP8):
        raise InputError(f"--vae {name!r} is none of {', '.join(VAE_NAMES)}, alone or with +{FP8}{''.join(f', or {other}' for other in others)}")
    return VAE_NAMES[kind], bool(plus)


class RandomWords:
    """A text encoder that has done its work: each prompt's vectors [tokens, text_dim] lie on the device, a function of the prompt."""

    def __init__(self, tokens: int, features: int, device: torch.device, dtype: torch.dtype):
        self.shape, self.device, self.dtype = (tokens, features), device, dtype
        self.made: dict[str, torch.Tensor] = {}

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        return [self._vectors(prompt) for prompt in prompts]

    def _vectors(self, prompt: str) -> torch.Tensor:
        if prompt not in self.made:
            seed = int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=6).digest(), "little")
            generator = torch.Generator(self.device).manual_seed(seed)
            self.made[prompt] = torch.randn(self.shape, generator=generator, device=self.device).to(self.dtype)
        return self.made[prompt]


class RandomNetworks:
    """Networks of `model`'s sizes. `window` and `chunk_frames` in latent frames; `prompt_tokens` real tokens of every prompt."""

    def __init__(self, model: str, geometry: Geometry | None, device: torch.device, *, window: int = 32, prompt_tokens: int = 128, layers: int | None = None):
        self.spec, self.device, self.window = model_spec(model), device, window
        self.dims = self.spec.dit if layers is None else replace(self.spec.dit, layers=layers)
        self.geometry = geometry or Geometry(self.spec.height, self.spec.width)
        self.prompt_tokens = min(prompt_tokens, self.dims.text_len)

    def pipeline(self, name: str) -> Pipeline:
        """A pipeline with a generator in the precision `name` and no codec."""
        chosen = precision(name)
        dit = filled(lambda: WanDiT(self.dims), self.device, chosen.dtype)
        if chosen.convert is not None:
            chosen.convert(dit, self.spec)
        join_projections(dit)
        return Pipeline(
            spec=replace(self.spec, dit=self.dims),
            dit=dit,
            codec=None,
            text_encoder=RandomWords(self.prompt_tokens, self.dims.text_dim, self.device, chosen.dtype),
            geometry=self.geometry,
            settings=RolloutSettings(chunk_frames=CHUNK_FRAMES, window_frames=self.window, sink_frames=CHUNK_FRAMES, kv_format=chosen.kv),
            device=self.device,
            dtype=chosen.dtype,
        )

    def codec(self, vae: str, name: str, group: int, tile_rows: int = 0) -> VideoCodec:
        """The VAE that `vae` means (`vae_kind`), with random weights; bfloat16 on a GPU. `tile_rows`: latent rows of a tile, 0 = whole frames."""
        kind, low = vae_kind(vae)
        dims = self.spec.vae.pruned(vae_type(kind).rate)
        codec = random_codec(dims, self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32, group)
        if low:
            decoder_to_fp8(codec.vae)
        if tile_rows:
            decode_in_tiles(codec, tile_rows)
            codec.group = group or codec.group
        return codec


class CheckpointNetworks:
    """Networks of a configuration file, through `Pipeline.load` (canonical order, text encoder included)."""

    def __init__(self, path: Path, overrides: tuple[str, ...], device: torch.device, mesh: Mesh):
        self.path, self.overrides, self.device, self.mesh = path, overrides, device, mesh

    def config(self, name: str, *more: str):
        from ..config import load_config

        return load_config(self.path, [*self.overrides, *precision(name).overrides, *more])

    def pipeline(self, name: str) -> Pipeline:
        return Pipeline.load(self.config(name), self.device, mesh=self.mesh)

    def codec(self, vae: str, name: str, group: int, tile_rows: int = 0) -> VideoCodec:
        from ..engine.parts import load_codec

        kind, low = vae_kind(vae)
        config = self.config(name, f"inference.vae_type={kind}", f"inference.vae_fp8={str(low).lower()}", f"inference.vae_tile_rows={tile_rows or 'null'}")
        codec, _ = load_codec(config, model_spec(config.model_kwargs.model_name), self.device)
        codec.group = group or codec.group
        return codec


def filled(factory: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """What `factory` builds, on `device` in `dtype`, with random matrices and neutral norms, without gradients. The same every time."""
    module = build_on_meta(factory).to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1.0)
            elif parameter.ndim > 1:
                parameter.normal_(std=_spread(parameter), generator=generator)
            else:
                parameter.fill_(float(name.endswith("weight")))
    return module.eval().requires_grad_(False)


def _spread(weight: torch.Tensor) -> float:
    """Of a convolution: such that it neither grows nor shrinks what passes; of the generator's matrices: `SHARE`."""
    return SHARE if weight.ndim in (2, 3) else weight[0].numel() ** -0.5


def random_codec(dims: VAEDims, device: torch.device, dtype: torch.dtype, group: int) -> VideoCodec:
    """A codec of random weights with Wan2.2's latent statistics (neutral ones for other latent widths), without an encoder."""

    def decoder() -> WanVAE:
        vae = WanVAE(dims)
        vae.drop_encoder()
        return vae

    mean, std = wan22_statistics()
    if dims.z_dim != mean.shape[1]:
        mean, std = torch.zeros(1, dims.z_dim), torch.ones(1, dims.z_dim)
    vae = filled(decoder, device, dtype)
    channels_last(vae)
    return VideoCodec(vae, mean, std, group=group)


def seconds_of(work: Callable[[], object], device: torch.device) -> tuple[object, float]:
    """(what `work` gives, seconds until the device has done it)."""
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - began
