"""A distilled student's LoRA as files: the published container (.pt) and PEFT's folder; both load as `checkpoints.lora_ckpt`.

    LOGDIR/lora.pt       {"generator_lora", "critic_lora" where the critic has one (spec training §9.1, D12), "step", "lora_rank", "lora_alpha"}
    LOGDIR/lora/         adapter_model.safetensors and adapter_config.json

The student's is the average's where there is one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.log import launch_rank
from ..models.lora import Adapter, adapter_of, adapter_state
from ..models.lora_files import adapter_from, write_lora
from ..parallel.fsdp import whole
from .cast import Cast, Voice
from .export import save_container

FILE, FOLDER = "lora.pt", "lora"


def save_adapters(folder: Path, cast: Cast, ema: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes both forms over older ones. Sharded tensors are gathered: then every rank must call it, and the first writes."""
    entries = {"generator_lora": _on_host(ema or adapter_state(cast.student.dit, cast.student.adapter))}
    if cast.critic.adapter is not None:
        entries["critic_lora"] = _on_host(adapter_state(cast.critic.dit, cast.critic.adapter))
    if launch_rank()[0]:
        return
    student = _adapter(cast.student, entries["generator_lora"])
    about = {"step": int(metadata["step"]), **{key: value for key, value in metadata.items() if key != "step"}}
    save_container(folder / FILE, {**entries, "lora_rank": student.rank, "lora_alpha": student.alpha, "weights": "ema" if ema else "raw", **about})
    _write_folder(folder / FOLDER, student)


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


def _adapter(voice: Voice, tensors: Mapping[str, Tensor]) -> Adapter:
    """The tensors as an adapter with the alpha of the network's."""
    return adapter_from(tensors, FOLDER).with_alpha(adapter_of(voice.dit, voice.adapter).alpha)

