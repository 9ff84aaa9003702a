"""A configuration's generator and adapters -> one merged checkpoint (spec inference §10.2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..core.errors import InputError
from ..models.lora_merge import check_target, merged_generator, write_merged
from ..models.spec import model_spec
from ..models.weights import native_state, read_state
from .adapters import configured_adapters
from .parts import generator_path


def merge_checkpoint(config, out: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Writes the generator of `config` with all its adapters (at their weights) merged in, and returns what the file says of itself.

    `.pt`: the published container; `.safetensors`: metadata. Tensors in `dtype`; the sums run on `device`. Raises InputError where there is no adapter or
    the file exists, ConfigError for a generator that is merged already, CheckpointError for files that do not fit.
    """
    check_target(out)
    adapters = configured_adapters(config)
    if not adapters:
        raise InputError("there is no LoRA to merge: checkpoints.lora_ckpt is not set; set it, or give --lora_ckpt")
    spec = model_spec(config.model_kwargs.model_name)
    path = generator_path(config, spec)
    state = native_state(read_state(path, use_ema=config.inference.use_ema, kind="generator"), "generator")
    tensors, about = merged_generator(state, adapters, spec, dtype=dtype, device=device)
    write_merged(out, tensors, about)
    return about
