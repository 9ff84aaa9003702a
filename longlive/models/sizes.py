"""The size of a network, read from its checkpoint.

A checkpoint's tensors say how wide and how deep it is; only the number of heads (and the length of the text) leaves no trace in them. The
`config.json` beside published weights says those; without it they follow the model that was asked for. So a smaller or larger model of the
same family loads from the documented places without another configuration. Where the tensors do not look like the network at all, the asked-for size
is returned and the strict loader names what differs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..core.errors import CheckpointError
from .spec import DiTDims, VAEDims

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(tensors: Mapping) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def read_model_config(folder: Path) -> dict:
    """`config.json` of a model folder; {} where there is none. Raises CheckpointError when it is not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it again, or remove it") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not an object; fetch it again, or remove it")
    return values


def dit_dims(shapes: Shapes, asked: DiTDims, config: Mapping | None = None) -> DiTDims:
    """Sizes of the DiT whose tensors have `shapes` (names of spec inference §1.2); `config` is its config.json.

    Heads: `num_heads` of `config`, else the head size of `asked`. Raises CheckpointError when the width does not split into heads.
    """
    config = config or {}
    try:
        dim, channels = shapes["patch_embedding.weight"][:2]
        ffn = shapes["blocks.0.ffn.0.weight"][0]
        text_dim = shapes["text_embedding.0.weight"][1]
        freq_dim = shapes["time_embedding.0.weight"][1]
    except (KeyError, IndexError):
        return asked
    if channels != asked.channels:
        return asked
    layers = _count(shapes, r"blocks\.(\d+)\.")
    heads = config.get("num_heads") or max(1, dim // asked.head_dim)
    if dim % heads or (dim // heads) % 2:
        raise CheckpointError(f"a transformer of width {dim} has no {heads} heads of even size; put config.json with num_heads beside its weights")
    text_len = config.get("text_len") or asked.text_len
    return replace(asked, dim=dim, ffn=ffn, layers=layers, heads=heads, text_dim=text_dim, text_len=text_len, freq_dim=freq_dim)


def vae_dims(shapes: Shapes, asked: VAEDims) -> VAEDims:
    """Sizes of the Wan2.2 VAE whose tensors have `shapes` (names of spec inference §5.1). A file without encoder keeps the asked-for one."""
    try:
        widest = shapes["decoder.conv1.weight"][0]
        encoder = shapes["encoder.conv1.weight"][0] if "encoder.conv1.weight" in shapes else asked.encoder_base
        z_dim = shapes["conv2.weight"][0]
    except (KeyError, IndexError):
        return asked
    if z_dim != asked.z_dim or widest % asked.multipliers[-1]:
        return asked
    return replace(asked, encoder_base=encoder, decoder_base=widest // asked.multipliers[-1])


def _count(shapes: Shapes, pattern: str) -> int:
    return 1 + max(int(found.group(1)) for name in shapes if (found := re.match(pattern, name)))
