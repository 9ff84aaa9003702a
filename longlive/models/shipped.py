"""The small model that comes with the package: `tiny`, where its files are (spec tiny; design §7)."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import CheckpointError, nearest

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "tiny"
VAE_FILE = "vae.safetensors"
ADAPTERS = {"tiny-4steps": "lora-4steps.safetensors", "tiny-2steps": "lora-2steps.safetensors"}  # few-step LoRAs, by the name that stands for their file


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


def adapter_path(given: str | Path) -> Path:
    """Where a LoRA is that a configuration names: a shipped one by its name in ADAPTERS, any other by its path.

    Raises CheckpointError for what is no file and nearly such a name.
    """
    if str(given) in ADAPTERS:
        return asset(ADAPTERS[str(given)])
    if not Path(given).exists() and (close := nearest(str(given), ADAPTERS)):
        raise CheckpointError(f"no LoRA at {given}; did you mean {close}, which ships?")
    return Path(given)
