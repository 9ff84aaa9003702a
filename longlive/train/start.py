"""What a training starts from: weights named in `checkpoints`, never the state of a stopped run (that is `checkpoint.resume`)."""

from __future__ import annotations

from ..models.wan_vae import WanVAE
from .export import STATISTICS


def load_vae(vae: WanVAE, path: str) -> None:
    """Loads the weights of a `vae.safetensors` into a VAE of the same sizes."""
    from safetensors.torch import load_file

    vae.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items() if name not in STATISTICS})
