"""Small trainings: a network and a VAE of milliseconds, the world as real videos in the documented layout, and the configuration over both."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from longlive.models import spec
from longlive.models.spec import DiTDims, VAEDims
from longlive.train.export import save_vae
from longlive.train.vae import initial_vae

DIT = DiTDims(dim=32, ffn=64, layers=2, heads=2, text_dim=20, text_len=64)


def shrink_tiny(models=spec.MODELS) -> None:
    """`tiny` with a network of seconds instead of minutes, in this process."""
    models["tiny"] = replace(spec.TINY, dit=DIT)


def write_vae(folder: Path) -> Path:
    """An untrained codec."""
    save_vae(folder, initial_vae(VAEDims(encoder_base=4, decoder_base=4), 0), torch.zeros(2, 48), torch.full((2, 48), 0.1), {})
    return folder / "vae.safetensors"


def training(data: Path, vae: Path, **sections) -> dict:
    """Three steps on 16 latent frames of 32 x 64 pixels."""
    tree = {
        "model_kwargs": {"model_name": "tiny"},
        "algorithm": {"trainer": "diffusion", "teacher_forcing": True},
        "data": {"data_path": str(data), "image_or_video_shape": [1, 16, 48, 2, 4], "num_workers": 0},
        "checkpoints": {"vae_ckpt": str(vae)},
        "infra": {"gradient_checkpointing": False},
        "training": {"lr": 1.0e-3, "max_iters": 3, "log_iters": 0, "ema_weight": 0.0},
        "logging": {"seed": 3},
    }
    return {name: tree.get(name, {}) | sections.get(name, {}) for name in {**tree, **sections}}


def losses(folder: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [(row["loss"], row["grad_norm"]) for row in rows]
