"""Checkpoints in and out: any documented container -> named tensors -> a module, strictly and with little memory.

The one idea: a model is built on the meta device (shapes, no memory) and each tensor of the mapped file is converted, assigned and given back in turn.
So memory holds the model and at most one more tensor, whatever the file's precision (spec inference §10.1, §11.B.7).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.errors import CheckpointError, ConfigError, InputError
from ..core.files import share
from . import keymaps
from .files import locate, open_file, release

NAMES = {"generator": "generator (DiT)", "vae": "VAE", "text": "text encoder", "lora": "LoRA", "nvfp4": "NVFP4-quantised generator"}
REMEDY = {
    "lora": "give it as checkpoints.lora_ckpt and the full weights as checkpoints.generator_ckpt",
    "nvfp4": "give the bf16 checkpoint",
    "transformer-engine": "give the merged bf16 checkpoint",
}
VAE_ENTRIES = ("state_dict", "gen_model", "generator")
MERGED_FORMAT = "longlive_generator_merged_lora"
MERGED_KEYS = ("merged_lora", "merged_adapters", "lora_ckpt")
QUANTIZATION = "quantization"  # the record of a container with packed weights (`fouroversix`)
HASH_WHOLE_BELOW = 2**30
SAMPLE = 2**20


@dataclass
class StateFile:
    """Named tensors of a checkpoint and what else it says about itself (metadata, small values). `mapped`: the tensors are views of files."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()
    mapped: bool = False


def read_state(path: str | Path, *, use_ema: bool = False, entry: str | None = None, kind: str | None = None) -> StateFile:
    """The tensors at `path` (a file, one of its shards, an index, a folder), without the wrappers of training frameworks in their names.

    Of a container the documented entry is taken: `entry` if given; for a VAE the first of state_dict, gen_model, generator; else as
    `unwrap_generator`. Raises CheckpointError for anything that is no such file.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    mapped = True
    for file in locate(path):
        content, info, views = open_file(file)
        mapped = mapped and views
        taken = _take(content, Path(path), use_ema, entry, kind)
        if not isinstance(taken, Mapping):
            raise CheckpointError(f"{path}: its generator entry is a {type(taken).__name__}, not a dictionary of tensors; save a state dict")
        metadata |= info | {k: v for k, v in content.items() if isinstance(v, (str, int, float, bool)) or k == QUANTIZATION}
        tensors |= {keymaps.strip_wrappers(k): v for k, v in taken.items() if isinstance(v, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; check that it is a checkpoint")
    return StateFile(tensors=tensors, metadata=metadata, path=Path(path), mapped=mapped)


def _take(content: Mapping, path: Path, use_ema: bool, entry: str | None, kind: str | None) -> Mapping:
    if entry is not None:
        if not isinstance(content.get(entry), Mapping):
            raise CheckpointError(f"{path} has no entry {entry!r} (it has {_some(content)}); check which checkpoint this is")
        return content[entry]
    if kind == "vae":
        return next((content[name] for name in VAE_ENTRIES if isinstance(content.get(name), Mapping)), content)
    taken = unwrap_generator(content, use_ema, path)
    if taken is content and not any(isinstance(v, Tensor) for v in content.values()):
        if "generator_lora" in content:
            raise CheckpointError(f"{path} holds only a LoRA (generator_lora), not a generator; {REMEDY['lora']}")
        raise CheckpointError(f"{path} holds no generator, generator_ema or model entry and no tensors (it has {_some(content)}); check which file this is")
    return taken


def unwrap_generator(content: Mapping, use_ema: bool, path: str | Path = "the checkpoint") -> Any:
    """The entry of a published container (spec §10.1): generator_ema (with `use_ema`), generator, model, else the container itself.

    Raises CheckpointError when only an EMA is there and `use_ema` is off.
    """
    if use_ema and "generator_ema" in content:
        return content["generator_ema"]
    if "generator" in content:
        return content["generator"]
    if "generator_ema" in content:
        raise CheckpointError(f"{path} holds only generator_ema; set inference.use_ema: true, or give a checkpoint with a generator entry")
    return content["model"] if "model" in content else content


def native_state(state: StateFile, kind: str | None) -> StateFile:
    """The same tensors under our names. Raises CheckpointError when the file is of another kind, or two keys fall together."""
    found = keymaps.identify(state.tensors)
    if kind is not None and found not in (kind, "unknown"):
        remedy = REMEDY.get(found, f"give a {NAMES[kind]} file")
        raise CheckpointError(f"{state.path} holds a {NAMES.get(found, found)} file, not a {NAMES[kind]}; {remedy}")
    to_ours = keymaps.native(kind, state.tensors)
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.tensors.items():
        ours = to_ours(name)
        if ours in tensors:
            raise CheckpointError(f"{state.path}: two keys mean {ours} (one is {name}); save the state dict again")
        if ours is not None:
            tensors[ours] = tensor
    return replace(state, tensors=tensors)


def build_on_meta(factory: Callable[[], nn.Module]) -> nn.Module:
    """What `factory` builds, with shapes and no memory."""
    with torch.device("meta"):
        return factory()


def load_into(
    module: nn.Module,
    source: str | Path | StateFile,
    *,
    kind: str | None = None,
    use_ema: bool = False,
    entry: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Puts a checkpoint into `module`, strictly, and returns its metadata.

    Parameters on the meta device are replaced by tensors on `device` (default CPU) in `dtype` (default: the file's); others are filled where they are.
    `kind` ("generator", "vae", "text") enables other key layouts and better errors. `change(name, tensor)` is what goes in instead, before it is cast
    (`lora_merge.merging`). Raises CheckpointError naming the first keys that differ.
    """
    state = source if isinstance(source, StateFile) else native_state(read_state(source, use_ema=use_ema, entry=entry, kind=kind), kind)
    targets = dict(_slots(module))
    check_keys({name: tuple(owner[leaf].shape) for name, (owner, leaf) in targets.items()}, state)
    for name, (owner, leaf) in targets.items():
        tensor = state.tensors.pop(name)
        given = change(name, tensor) if change else tensor
        kept = _fill(owner, leaf, given, device, dtype) and given is tensor
        if state.mapped and not kept:
            release(tensor)
    return state.metadata


def _slots(module: nn.Module):
    """(name, (dictionary that holds it, its name there)) of every parameter and persistent buffer, shared ones under each name."""
    for prefix, child in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, value in child._parameters.items():
            if value is not None:
                yield dot + name, (child._parameters, name)
        for name, value in child._buffers.items():
            if value is not None and name not in child._non_persistent_buffers_set:
                yield dot + name, (child._buffers, name)


def _fill(owner: dict, leaf: str, tensor: Tensor, device, dtype: torch.dtype | None) -> bool:
    """Whether the module now holds `tensor` itself (it was right as it is)."""
    target = owner[leaf]
    if not target.is_meta:
        with torch.no_grad():
            target.copy_(tensor)
        return False
    placed = tensor.to(device=device or "cpu", dtype=dtype if tensor.is_floating_point() else None)
    owner[leaf] = nn.Parameter(placed, requires_grad=target.requires_grad) if isinstance(target, nn.Parameter) else placed
    return placed is tensor


def check_keys(expected: Mapping[str, tuple[int, ...]], state: StateFile) -> None:
    """Raises CheckpointError that names the first missing, unexpected and wrongly shaped keys."""
    found = {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shapes = [f"{name} is {list(found[name])}, expected {list(expected[name])}" for name in expected if name in found and found[name] != expected[name]]
    parts = [f"{word} {_few(names)}" for word, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape:", shapes)) if names]
    if parts:
        raise CheckpointError(f"{state.path} does not fit this model: {'; '.join(parts)}; check that the file belongs to the model that is asked for")


def _few(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _some(content: Mapping) -> str:
    return _few([str(key) for key in content], 4) or "nothing"


def merge_record(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a generator's metadata says of LoRAs that are merged into it, for weights made from it; empty where none is (spec inference §10.2)."""
    merged = metadata.get("merged_lora") not in (None, False, "", "false", "False") or metadata.get("checkpoint_format") == MERGED_FORMAT
    return {"checkpoint_format": MERGED_FORMAT} | {key: metadata[key] for key in MERGED_KEYS if key in metadata} if merged else {}


def refuse_lora_on_merged(metadata: Mapping[str, Any], lora_ckpt: str | Path | None) -> None:
    """Raises ConfigError when the generator's metadata says that a LoRA is merged into it and the configuration asks for one (spec §10.2)."""
    if merge_record(metadata) and lora_ckpt:
        raise ConfigError(f"the generator already has a LoRA merged into it and lora_ckpt is {lora_ckpt}; remove lora_ckpt and the adapter section")


def save_state(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> Path:
    """Writes a safetensors file that appears whole or not at all. Metadata values that are no strings are written as JSON."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, str(partial), words)
        share(partial)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); check the folder and the free space") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def save_torch(path: str | Path, content: Mapping[str, Any]) -> Path:
    """torch.save that appears whole or not at all. Raises InputError where it cannot be written."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(content), partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} cannot be written ({str(error).splitlines()[0]}); check the folder and the free space") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def weights_hash(path: str | Path) -> str:
    """A name for the content of the weights at `path`: `sha256:...` over all files below 1 GiB in total.

    Larger ones are sampled, `sampled-sha256:...` over sizes and 1 MiB out of every 64: enough to tell files apart, not to prove them untouched.
    """
    files = locate(path)
    sizes = [file.stat().st_size for file in files]
    whole = sum(sizes) < HASH_WHOLE_BELOW
    digest = hashlib.sha256()
    for file, size in zip(files, sizes):
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            for start in range(0, size, SAMPLE if whole else 64 * SAMPLE):
                stream.seek(start)
                digest.update(stream.read(SAMPLE))
    return f"{'' if whole else 'sampled-'}sha256:{digest.hexdigest()}"
