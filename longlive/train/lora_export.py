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

from ..core.errors import CheckpointError
from ..core.log import launch_rank
from ..models.files import SHARD_INDEX
from ..models.lora import Adapter, adapter_of, adapter_state
from ..models.lora_files import ABOUT, ENTRY, adapter_from, holds_lora, is_lora, read_lora, write_lora
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

def export_lora(source: Path, out: Path, *, use_ema: bool, layout: str, dtype: torch.dtype, rank: int | None = None) -> dict[str, str]:
    """Writes the student's LoRA of any checkpoint of a distillation, or of a LoRA's file, in a layout of `models.lora_files`; returns what is said of it.

    `rank`: the nearest LoRA of no higher rank than that. Raises CheckpointError for a source without one, or without an average where `use_ema` asks for
    it, InputError for a path that exists or does not suit.
    """
    place = (folders(source) or [source])[-1]
    entry = ENTRY + ("_ema" if use_ema else "")
    if use_ema and not holds_lora(place, entry):
        raise CheckpointError(f"{place} holds no average of the LoRA's weights (training.ema_weight was 0, or it is a weight file); leave --ema out")
    adapter = read_lora(place, name=FOLDER, entry=entry)
    if rank is not None:
        adapter = adapter.truncated(rank)
    if folders(source) or place.is_dir() and (place / SHARD_INDEX).is_file():
        adapter = replace(adapter, metadata=adapter.metadata | {"weights": "ema" if use_ema else "raw"})
    write_lora(out, adapter, layout, dtype)
    about = {key: str(adapter.metadata[key]) for key in ABOUT if key in adapter.metadata}
    return about | {"dtype": str(dtype).removeprefix("torch."), "rank": str(adapter.rank), "layout": layout}


def trained_lora(source: Path) -> bool:
    """Whether a checkpoint, the newest of a LOGDIR, or a file is of a LoRA alone."""
    return is_lora((folders(source) or [source])[-1])
