"""A distilled student's LoRA as files: the published container (.pt) and PEFT's folder; both load as `checkpoints.lora_ckpt`.

    LOGDIR/lora.pt       {"generator_lora", "critic_lora" where the critic has one (spec training §9.1, D12), "step", "lora_rank", "lora_alpha"}
    LOGDIR/lora/         adapter_model.safetensors and adapter_config.json

The student's is the average's where there is one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import CheckpointError, InputError
from ..core.log import launch_rank
from ..models.files import SHARD_INDEX
from ..models.lora import Adapter, adapter_of, adapter_state
from ..models.lora_files import ABOUT, ENTRY, adapter_from, holds_lora, is_lora, read_lora, write_lora
from ..models.shipped import adapter_path
from ..parallel.fsdp import whole
from .cast import STUDENT
from .checkpoint import folders
from .export import save_container

FILE, FOLDER = "lora.pt", "lora"


def save_adapters(folder: Path, networks: Mapping[str, nn.Module], ema: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes both forms over older ones. `networks`: by the name of the LoRA on it, `generator` first; `ema` is that one's average.

    Sharded tensors are gathered: then every rank must call it, and the first writes.
    """
    entries = {f"{name}_lora": _on_host(ema if ema and name == STUDENT else adapter_state(network, name)) for name, network in networks.items()}
    if launch_rank()[0]:
        return
    student = _adapter(networks[STUDENT], entries[ENTRY])
    about = {"step": int(metadata["step"]), **{key: value for key, value in metadata.items() if key != "step"}}
    save_container(folder / FILE, {**entries, "lora_rank": student.rank, "lora_alpha": student.alpha, "weights": "ema" if ema else "raw", **about})
    _write_folder(folder / FOLDER, replace(student, metadata={**metadata, "weights": "ema" if ema else "raw"}))


def _write_folder(place: Path, adapter: Adapter) -> None:
    new, old = place.with_name(place.name + "-new"), place.with_name(place.name + "-old")
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    write_lora(new, adapter, "peft")
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old, ignore_errors=True)


def _on_host(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(tensor.detach()).to(torch.bfloat16).cpu() for name, tensor in state.items()}


def _adapter(network: nn.Module, tensors: Mapping[str, Tensor]) -> Adapter:
    """The tensors as an adapter with the alpha of the network's."""
    return adapter_from(tensors, FOLDER).with_alpha(adapter_of(network, STUDENT).alpha)


def export_lora(
    source: Path, out: Path, *, use_ema: bool, layout: str, dtype: torch.dtype, rank: int | None = None, alpha: float | None = None
) -> dict[str, str]:
    """Writes the student's LoRA of any checkpoint of a distillation, or of a LoRA's file, in a layout of `models.lora_files`; returns what is said of it.

    `rank`: the nearest LoRA of no higher rank than that. `alpha`: that of a file that states none. Raises CheckpointError for a source without one, or
    without an average where `use_ema` asks for it, InputError for a path that exists or does not suit, and for an alpha that is missing or contradicts.
    """
    place = _place(source)
    entry = ENTRY + ("_ema" if use_ema else "")
    if use_ema and not holds_lora(place, entry):
        if read_lora(place).metadata.get("weights") == "ema":
            raise CheckpointError(f"{place} is the average of the LoRA's weights already; leave --ema out")
        raise CheckpointError(f"{place} holds no average of the LoRA's weights (training.ema_weight was 0, or it is a weight file); leave --ema out")
    adapter = _with_alpha(read_lora(place, name=FOLDER, entry=entry), alpha, place, silent=layout == "published" and rank is None)
    if rank is not None:
        adapter = adapter.truncated(rank)
    if folders(source) or place.is_dir() and (place / SHARD_INDEX).is_file():
        adapter = replace(adapter, metadata=adapter.metadata | {"weights": "ema" if use_ema else "raw"})
    write_lora(out, adapter, layout, dtype)
    about = {key: str(adapter.metadata[key]) for key in ABOUT if key in adapter.metadata}
    return about | {"dtype": str(dtype).removeprefix("torch."), "rank": str(adapter.rank), "layout": layout}


def _with_alpha(adapter: Adapter, alpha: float | None, place: Path, *, silent: bool) -> Adapter:
    """The adapter with the alpha that what is written says; `silent`: that says none where the file says none."""
    if alpha is not None and alpha <= 0:
        raise InputError(f"--alpha {alpha:g}: the scale of a LoRA is alpha / rank; give a number above 0")
    if all(layer.alpha is not None for layer in adapter.layers.values()):
        if alpha not in (None, adapter.alpha):
            raise InputError(f"--alpha {alpha:g} but {place} states its own{f', {adapter.alpha:g}' if adapter.alpha else ''}; leave --alpha out")
        return adapter
    if adapter.rank is None:  # one alpha would scale each layer by another factor; without one they have scale 1, as they generate
        if alpha is not None:
            raise InputError(f"--alpha {alpha:g} but the layers of {place} differ in rank and state none, so that they have scale 1; leave --alpha out")
        return adapter
    if alpha is not None:
        return adapter.with_alpha(alpha)
    if not silent:
        usual = f", {adapter.rank} if that was its rank" if adapter.rank else ""
        raise InputError(f"{place} states no alpha, and its scale is alpha / rank; give --alpha, the one it was trained with{usual}")
    return adapter


def _place(source: Path) -> Path:
    """The newest checkpoint of a LOGDIR, else the file, where a shipped LoRA's name stands for its file."""
    return (folders(source) or [adapter_path(source)])[-1]


def trained_lora(source: Path) -> bool:
    """Whether a checkpoint, the newest of a LOGDIR, or a file is of a LoRA alone."""
    return is_lora(_place(source))
