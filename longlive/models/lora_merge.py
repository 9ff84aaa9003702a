"""LoRA merged into the weights: at load, one tensor at a time, or into a checkpoint that says so.

Merging cannot be undone from the file, and merging twice is never meant: the metadata of a merged generator makes every later attempt an error.

Legend: I features in, O features out, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from .files import release
from .lora import Adapter, LoraLayer, check_fit, finite_weight
from .spec import ModelSpec
from .weights import MERGED_FORMAT, StateFile, refuse_lora_on_merged, save_state, save_torch

Weighted = Sequence[tuple[Adapter, float]]


def merge_weight(
    weight_OI: Tensor, parts: Sequence[tuple[LoraLayer, float]], dtype: torch.dtype, device: torch.device | str | None = None, *, stepwise: bool = False
) -> Tensor:
    """W + sum of weight * (alpha / rank) * B A over `parts` (layer, weight), computed in float32 and rounded once, to `dtype`, on `device`.

    stepwise: W, A, B, each product and each sum are rounded to `dtype`, as in files that the published script merged on a CPU. It errs more than one
    rounding does, and is there to compare with such files.
    """
    exact = torch.promote_types(weight_OI.dtype, torch.float32)
    total = weight_OI.to(device=device, dtype=dtype if stepwise else exact)
    for layer, weight in parts:
        a_RI, b_OR = (t.to(device=device, dtype=dtype if stepwise else exact).to(exact) for t in (layer.a_RI, layer.b_OR))
        scale = weight * layer.scale
        total = total + ((b_OR @ a_RI) * scale).to(dtype) if stepwise else torch.addmm(total, b_OR, a_RI, alpha=scale)
    return total.to(dtype)


def merging(
    adapters: Weighted, spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device | str | None = None
) -> Callable[[str, Tensor], Tensor]:
    """A change of tensors by name, for `weights.load_into`: the weights that `adapters` (each with its weight) touch come out merged.

    `shapes` are those of the generator's tensors. Raises CheckpointError when an adapter was made for another model.
    """
    features = {
        name.removesuffix(".weight"): tuple(shape)
        for name, shape in shapes.items()
        if name.endswith(".weight") and any(fnmatchcase(name.removesuffix(".weight"), pattern) for pattern in spec.linear_patterns)
    }
    for adapter, weight in adapters:
        check_fit(adapter, features)
        finite_weight(weight, adapter.name)

    def change(name: str, tensor: Tensor) -> Tensor:
        layer = name.removesuffix(".weight")
        parts = [(adapter.layers[layer], weight) for adapter, weight in adapters if name.endswith(".weight") and layer in adapter.layers]
        return merge_weight(tensor, parts, dtype, device) if parts else tensor

    return change


def merged_generator(
    state: StateFile, adapters: Weighted, spec: ModelSpec, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors under our names on the CPU in `dtype`, metadata) of a generator with `adapters` merged in; `state` is emptied. The sums run on `device`.

    The metadata is that of the published merged export, and the adapters with their weights and scales. Raises ConfigError for a generator that is
    already merged, CheckpointError for an adapter of another model.
    """
    refuse_lora_on_merged(state.metadata, ", ".join(str(adapter.path or adapter.name) for adapter, _ in adapters))
    change = merging(adapters, spec, {name: tuple(t.shape) for name, t in state.tensors.items()}, dtype, device)
    tensors = {}
    for name in list(state.tensors):
        tensor = state.tensors.pop(name)
        done = change(name, tensor)
        tensors[name] = done.to("cpu", dtype if done.is_floating_point() else None, copy=done is tensor)
        if state.mapped:
            release(tensor)
    return tensors, merged_metadata(state, adapters, spec, dtype)


def merged_metadata(state: StateFile, adapters: Weighted, spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
    """What a merged checkpoint says of itself (spec inference §10.2): single words and numbers only, so that every container can hold it."""
    about = [{"name": a.name, "path": str(a.path or ""), "weight": weight, "rank": a.rank, "alpha": a.alpha} for a, weight in adapters]
    return {
        "checkpoint_format": MERGED_FORMAT,
        "generator_ckpt": str(state.path),
        "lora_ckpt": ", ".join(str(a.path or a.name) for a, _ in adapters),
        "model_name": spec.name,
        "dtype": str(dtype).removeprefix("torch."),
        "merged_lora": True,
        "merged_adapters": json.dumps(about),
    }


def check_target(path: Path) -> Path:
    """`path`, if a merged generator may be written there. Raises InputError for one that exists or has another ending."""
    if path.exists():
        raise InputError(f"{path} exists; name another file, or remove it")
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise InputError(f"{path}: end it with .pt or .safetensors")
    return path


def write_merged(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Writes what `merged_generator` gave: `.pt` as the published container {"generator": {"model.<name>": tensor}, ...}, `.safetensors` with metadata.

    Raises InputError for a path that exists or has another ending.
    """
    path = check_target(Path(path))
    if path.suffix == ".safetensors":
        return save_state(path, tensors, metadata)
    return save_torch(path, {"generator": {f"model.{name}": tensor for name, tensor in tensors.items()}, **metadata})
