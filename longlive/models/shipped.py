"""The small model that comes with the package: `tiny`, its files and how to get its parts (spec tiny; design §7)."""

from __future__ import annotations

from pathlib import Path

import torch

from ..core.errors import CheckpointError
from .codec import VideoCodec, cpu_dtype
from .light_vae import read_codec
from .sizes import dit_dims, shapes_of
from .spec import TINY
from .text import PromptCache, text_encoder
from .wan_dit import WanDiT
from .weights import build_on_meta, load_into, native_state, read_state

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "tiny"
VAE_FILE = "vae.safetensors"
JUDGE_FILE = "judge.safetensors"
CPU_GROUP = 2


def asset(name: str) -> Path:
    """The path of a shipped file. Raises CheckpointError when the installation lacks it."""
    path = ASSETS / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: this installation lacks the weights of tiny; reinstall it, or train them with configs/tiny")
    return path


def dit_path() -> Path:
    """The first part of the shipped generator (`dit-0000i-of-0000n.safetensors`); readers find the others."""
    parts = sorted(ASSETS.glob("dit-*-of-*.safetensors"))
    return parts[0] if parts else asset("dit-00001-of-00001.safetensors")


def tiny_dit(device: torch.device | str | None = None, dtype: torch.dtype | None = torch.float32) -> WanDiT:
    """The shipped generator, without gradients."""
    return dit_from(dit_path(), device=device, dtype=dtype)


def dit_from(path: str | Path, *, use_ema: bool = False, device=None, dtype: torch.dtype | None = None) -> WanDiT:
    """A generator of the small family from any checkpoint, sized from its tensors, without gradients."""
    state = native_state(read_state(path, use_ema=use_ema, kind="generator"), "generator")
    dims = dit_dims(shapes_of(state.tensors), TINY.dit)
    dit = build_on_meta(lambda: WanDiT(dims)).requires_grad_(False).eval()
    load_into(dit, state, kind="generator", device=device, dtype=dtype)
    return dit


def tiny_codec(device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, group: int | None = None) -> VideoCodec:
    """The shipped VAE with its latent statistics.

    On a CPU `dtype` defaults to the one this processor convolves fastest, and decoding goes two latent frames at a time (`group`), which its cache likes.
    """
    on_cpu = torch.device(device or "cpu").type == "cpu"
    dtype = dtype or (cpu_dtype() if on_cpu else torch.bfloat16)
    group = group if group is not None else CPU_GROUP if on_cpu else 0
    return read_codec(asset(VAE_FILE), TINY.vae, device=device, dtype=dtype, group=group)


def tiny_text_encoder() -> PromptCache:
    """The small model's text encoder; it has no weights."""
    return text_encoder(TINY)
