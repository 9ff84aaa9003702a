"""About how much memory and time a film takes here: arithmetic of the model, a short matrix multiplication for the machine.

Operations per chunk are counted (linear layers, attention over the window, VAE decoder); the machine's rate is measured for a tenth of
a second. Good to a factor of two, which is what a plan needs; the receipt of a film has the real numbers.

The count of the decoder is scaled from Wan2.2's: 66.30 TFLOP per latent frame at 44 x 80 latents with base 256 (spec inference §5.1).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ..core.geometry import Geometry
from ..core.story import Storyboard
from ..models.spec import DiTDims, ModelSpec, VAEDims, model_spec, vae_type
from .pipeline import rollout_settings

WAN_DECODE_FLOP, WAN_DECODE_BASE, WAN_LATENT_PIXELS = 66.30e12, 256, 44 * 80
DIT_SHARE = {"cpu": 0.8, "cuda": 0.6}  # of the measured rate that a whole chunk reaches
DECODE_SHARE = {"cpu": 0.6, "cuda": 0.4}
UMT5_PARAMETERS = 5.68e9
PROCESS_BYTES = 0.35 * 2**30  # Python and its libraries


@dataclass(frozen=True)
class Estimate:
    """`memory_bytes` of weights, pages and working space; `seconds` for the whole film; `chunk_seconds` per steady chunk."""

    memory_bytes: float
    seconds: float
    chunk_seconds: float

    def words(self) -> str:
        if self.seconds < 90:
            return f"about {max(1, round(self.seconds))} s"
        return f"about {self.seconds / 60:.0f} min" if self.seconds < 5400 else f"about {self.seconds / 3600:.1f} h"


def dit_parameters(dims: DiTDims) -> int:
    """Weights of the DiT's blocks, embeddings and head."""
    block = 8 * dims.dim**2 + 2 * dims.dim * dims.ffn
    return dims.layers * block + dims.dim * (6 * dims.dim + 2 * dims.dim + dims.text_dim + 8 * dims.channels)


def chunk_flop(dims: DiTDims, tokens: int, window_tokens: int) -> float:
    """Operations of one forward over a chunk of `tokens` that sees `window_tokens`."""
    linear = 2 * tokens * dims.layers * (6 * dims.dim**2 + 2 * dims.dim * dims.ffn)
    return linear + 4 * dims.layers * tokens * dims.dim * (window_tokens + dims.text_len)


def decode_flop(base: int, geometry: Geometry, latent_frames: int) -> float:
    """Operations of decoding `latent_frames`."""
    pixels = geometry.latent_height * geometry.latent_width / WAN_LATENT_PIXELS
    return WAN_DECODE_FLOP * (base / WAN_DECODE_BASE) ** 2 * pixels * latent_frames


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product here."""
    size = 512 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device, dtype=dtype)
    (a @ a).sum().item()
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < 0.1:
        (a @ a).sum().item()
        count += 1
    return count * 2 * size**3 / spent


def estimate(config, board: Storyboard, chunks: int, device: torch.device, dtype: torch.dtype) -> Estimate:
    """The estimate for one film of `chunks` chunks with all its samples. Reads no weights."""
    spec: ModelSpec = model_spec(config.model_kwargs.model_name)
    settings, samples = rollout_settings(config), config.inference.num_samples
    geometry = Geometry(*board.size) if board.size else Geometry.of_latent(*config.data.image_or_video_shape[3:])
    branches = 2 if settings.guidance != 1.0 else 1
    tokens = settings.chunk_frames * geometry.frame_tokens
    base = spec.vae.pruned(vae_type(config.inference.vae_type).rate).decoder_base
    rate = measured_rate(device, dtype)
    denoise = (settings.steps + 1) * branches * samples * chunk_flop(spec.dit, tokens, settings.pages * tokens)
    decode = samples * decode_flop(base, geometry, settings.chunk_frames)
    chunk_seconds = denoise / (rate * DIT_SHARE[device.type]) + decode / (rate * DECODE_SHARE[device.type])
    item = torch.empty((), dtype=dtype).element_size()
    pages = 2 * spec.dit.layers * samples * branches * settings.pages * tokens * spec.dit.dim * item
    text = UMT5_PARAMETERS * item if spec.text_kind == "umt5-xxl" else 0
    weights = dit_parameters(spec.dit) * item + vae_parameters(spec.vae) * item + text
    working = samples * (16 * tokens * spec.dit.ffn * item + 24 * base * geometry.height * geometry.width * item)
    return Estimate(PROCESS_BYTES + weights + pages + working, chunks * chunk_seconds, chunk_seconds)


def vae_parameters(dims: VAEDims) -> float:
    """Weights of encoder and decoder, scaled from Wan2.2's (spec inference §5.1)."""
    return 149.6e6 * (dims.encoder_base / 160) ** 2 + 555.0e6 * (dims.decoder_base / 256) ** 2
