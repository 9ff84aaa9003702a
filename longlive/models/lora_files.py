"""LoRA files in and out: five layouts, one canonical form (`lora.Adapter`).

What differs is spelling only: what stands before the name of a layer, how the layer is called, how A and B are called, and where alpha is.

    published   {"generator_lora": tensors} (.pt), or the bare tensors; base_model.model.blocks.0.self_attn.q.lora_A.weight; states no alpha
    peft        a folder: adapter_config.json (rank, alpha, patterns) and adapter_model.safetensors with the same names
    diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight
    comfyui     diffusion_model.blocks.0.self_attn.q.lora_down.weight, .lora_up.weight, .alpha
    kohya       lora_unet_blocks_0_self_attn_q.lora_down.weight, .lora_up.weight, .alpha

A reader takes any mixture of these; a key that fits none is an error that names it. (Spec inference §10.2, training §1.5.)
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError, InputError
from .files import locate, open_file
from .keymaps import DIT, identify, rename, strip_wrappers
from .lora import PUBLISHED, Adapter, LoraLayer
from .weights import save_state, save_torch

ENTRY = "generator_lora"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ABOUT = ("trainer", "steps", "step", "seed", "weights")  # what a training run says of its adapter
PREFIXES = (PUBLISHED, "transformer.", "model.", "diffusion_model.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")
FLAT = re.compile(r"^blocks_(\d+)_(self_attn|cross_attn|attn1|attn2|ffn)_(.+)$")
ENDING = re.compile(r"^(?P<layer>.+?)\.(?:lora_(?P<side>A|B|down|up)(?:\.\w+)?\.weight|lora\.(?P<old>down|up)\.weight|(?P<alpha>alpha))$")
SIDES = {"A": "A", "down": "A", "B": "B", "up": "B"}
TO_DIFFUSERS = (
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.([qkv])$", r".to_\1"),
    (r"\.o$", ".to_out.0"),
    (r"\.ffn\.0$", ".ffn.net.0.proj"),
    (r"\.ffn\.2$", ".ffn.net.2"),
)
# what an adapter_config.json may say that is more than B A, with the value that means "no"
MORE_THAN_LORA = {"use_dora": False, "bias": "none", "modules_to_save": None, "lora_bias": False, "fan_in_fan_out": False}


def read_lora(path: str | Path, *, name: str | None = None, entry: str = ENTRY) -> Adapter:
    """The adapter at `path`: a file in any of the layouts, or a folder that holds one.

    `name`: what it is called on the network (default: the file's or folder's name). `entry`: which one of a training container ("critic_lora" is the other).
    Raises CheckpointError for a file that is none, for keys that fit nothing, and for a kind of adapter that is more than LoRA.
    """
    path = Path(path)
    config = _peft_config(path)
    tensors, metadata = {}, {}
    for file in locate(path / PEFT_WEIGHTS if config and path.is_dir() and (path / PEFT_WEIGHTS).is_file() else path):
        content, info, _ = open_file(file)
        metadata |= info | {k: v for k, v in content.items() if isinstance(v, (str, int, float, bool))}
        tensors |= _take(content, path, entry)
    layers = _layers(tensors, path)
    alphas = _alphas_of(config or _diffusers_config(metadata, path), layers, path)
    layers = {n: layer if layer.alpha is not None or n not in alphas else replace(layer, alpha=alphas[n]) for n, layer in layers.items()}
    adapter = Adapter(name=name or adapter_name(path), layers=layers, path=path, metadata=metadata)
    return adapter.with_alpha(float(metadata["lora_alpha"])) if "lora_alpha" in metadata else adapter


def adapter_from(tensors: Mapping[str, Tensor], name: str) -> Adapter:
    """The adapter that named tensors are, in any layout that states no alpha apart from its tensors."""
    return Adapter(name=name, layers=_layers(tensors, Path(name)))


def adapter_name(path: Path) -> str:
    """The name of an adapter from its file or folder: dmd_lora.pt -> dmd_lora."""
    return path.name if path.is_dir() else path.stem


def holds_lora(path: str | Path, entry: str = ENTRY) -> bool:
    """Whether a generator's checkpoint also holds an adapter."""
    return any(isinstance(open_file(file)[0].get(entry), Mapping) for file in locate(path))


def is_lora(path: str | Path) -> bool:
    """Whether what is at `path`, in any layout, is a LoRA and no generator. Raises CheckpointError for what is no weight file."""
    content = {name: value for file in locate(path) for name, value in open_file(file)[0].items()}
    if isinstance(content.get(ENTRY), Mapping):
        return not isinstance(content.get("generator"), Mapping)
    return identify(strip_wrappers(name) for name, value in content.items() if isinstance(value, Tensor)) == "lora"


def _take(content: Mapping, path: Path, entry: str) -> dict[str, Tensor]:
    taken = content.get(entry, content)
    if not isinstance(taken, Mapping):
        raise CheckpointError(f"{path}: its {entry} entry is a {type(taken).__name__}, not a dictionary of tensors; save a state dict")
    tensors = {strip_wrappers(key): value for key, value in taken.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no {entry} entry and no tensors; give a LoRA file")
    return tensors


def layer_name(written: str) -> str:
    """Our name of a layer, from any layout's (without the ending): lora_unet_blocks_3_attn1_to_out_0 -> blocks.3.self_attn.o."""
    for prefix in FLAT_PREFIXES:
        if written.startswith(prefix) and (flat := FLAT.match(written.removeprefix(prefix))):
            written = f"blocks.{flat[1]}.{flat[2]}." + re.sub(r"_(?=\d)|(?<=\d)_", ".", flat[3])
    for prefix in PREFIXES:
        written = written.removeprefix(prefix)
    return rename(written + ".", DIT).removesuffix(".")


def _layers(tensors: Mapping[str, Tensor], path: Path) -> dict[str, LoraLayer]:
    found: dict[str, dict[str, Tensor]] = {}
    odd = []
    for key, tensor in tensors.items():
        match = ENDING.match(key)
        part = None if match is None else "alpha" if match["alpha"] else SIDES[match["side"] or match["old"]]
        if part is None or not layer_name(match["layer"]).startswith("blocks.") or (part != "alpha" and tensor.ndim != 2):
            odd.append(key)
            continue
        parts = found.setdefault(layer_name(match["layer"]), {})
        if part in parts:
            raise CheckpointError(f"{path}: two keys mean {part} of {layer_name(match['layer'])} (one is {key}); keep one of them")
        parts[part] = tensor
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        remedy = "give a LoRA of the Wan transformer (lora_A/lora_B or lora_down/lora_up and alpha)"
        raise CheckpointError(f"{path}: {', '.join(odd[:3])}{more} fit no LoRA layer; {remedy}")
    return {layer: _layer(layer, parts, path) for layer, parts in found.items()}


def _layer(name: str, parts: dict[str, Tensor], path: Path) -> LoraLayer:
    lacks = [side for side in "AB" if side not in parts]
    if lacks:
        raise CheckpointError(f"{path}: {name} has no {' and no '.join(lacks)}; the file is not whole, fetch it again")
    a_RI, b_OR = parts["A"], parts["B"]
    if a_RI.shape[0] != b_OR.shape[1] or not a_RI.shape[0]:
        raise CheckpointError(f"{path}: {name} has A {list(a_RI.shape)} and B {list(b_OR.shape)}, two ranks; the file is damaged, fetch it again")
    return LoraLayer(a_RI=a_RI, b_OR=b_OR, alpha=float(parts["alpha"]) if "alpha" in parts else None)


def _peft_config(path: Path) -> dict[str, Any] | None:
    """adapter_config.json in the folder `path`, or beside the file that PEFT names adapter_model."""
    beside = path / PEFT_CONFIG if path.is_dir() else path.parent / PEFT_CONFIG if path.stem == "adapter_model" else None
    if beside is None or not beside.is_file():
        return None
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
        kind = config.get("peft_type", "LORA")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{beside} cannot be read ({error}); fetch it again") from None
    more = {key: config[key] for key, no in MORE_THAN_LORA.items() if config.get(key, no) not in (no, None)}
    if kind != "LORA" or more:
        what = kind if kind != "LORA" else ", ".join(f"{key} = {value!r}" for key, value in more.items())
        raise CheckpointError(f"{beside}: {what} is more than plain LoRA; merge it with the tool that made it, and give the merged generator")
    return config


def _diffusers_config(metadata: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """What diffusers writes into the metadata of a safetensors file: the keys of adapter_config.json after `transformer.`."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return None
    try:
        return {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: lora_adapter_metadata is not JSON ({error}); fetch it again, or save it without") from None


def _alphas_of(config: dict[str, Any] | None, layers: Mapping[str, LoraLayer], path: Path) -> dict[str, float]:
    """Layer -> alpha where a PEFT configuration states one: `alpha_pattern`, then `lora_alpha`; a rank-stabilised scale as the alpha that it amounts to."""
    if not config or config.get("lora_alpha") is None:
        return {}
    patterns = {key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()}
    found = {}
    for name, layer in layers.items():
        alpha = next((value for key, value in patterns.items() if _pattern_fits(key, name)), float(config["lora_alpha"]))
        found[name] = alpha * math.sqrt(layer.rank) if config.get("use_rslora") else alpha
    return found


def _pattern_fits(key: str, name: str) -> bool:
    """PEFT's rule: `^...` is a regular expression for the whole name, anything else one for its end."""
    try:
        return bool(re.match(key, name) if key.startswith("^") else re.match(rf"(?:.*\.)?(?:{key})$", name) or layer_name(key) == name)
    except re.error:
        return layer_name(key) == name


# ------------------------------------------------------------ writing


def write_lora(path: str | Path, adapter: Adapter, layout: str = "published", dtype: torch.dtype | None = None) -> Path:
    """Writes `adapter` in a layout of this module's table; tensors in `dtype` (default: as they are). It appears whole or not at all.

    `peft` makes a folder. A layout that cannot state an alpha (diffusers; published, where layers differ) has the scale multiplied into B instead.
    Raises InputError for an unknown layout and for a path that exists or whose ending does not suit.
    """
    path = Path(path)
    if layout not in WRITERS:
        raise InputError(f"unknown LoRA layout {layout!r}; the layouts are {', '.join(WRITERS)}")
    ending, write = WRITERS[layout]
    if path.suffix != ending:
        raise InputError(f"{path}: a LoRA in the {layout} layout is {f'a file that ends with {ending}' if ending else 'a folder, without an ending'}")
    if path.exists():
        raise InputError(f"{path} exists; name another one, or remove it")
    write(path, adapter, dtype)
    return path


def _pair(prefix: str, name: str, words: tuple[str, str], layer: LoraLayer, dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {f"{prefix}{name}.{word}.weight": t.detach().to("cpu", dtype, copy=True) for word, t in zip(words, (layer.a_RI, layer.b_OR))}


def _scaled(layer: LoraLayer, dtype: torch.dtype | None) -> LoraLayer:
    """The same layer with its scale inside B: alpha equals the rank."""
    if layer.scale == 1.0:
        return replace(layer, alpha=None)
    b_OR = (layer.b_OR.to(torch.promote_types(layer.b_OR.dtype, torch.float32)) * layer.scale).to(dtype or layer.b_OR.dtype)
    return LoraLayer(a_RI=layer.a_RI, b_OR=b_OR)


def _write_published(path: Path, adapter: Adapter, dtype: torch.dtype | None) -> None:
    uniform = adapter.rank is not None and adapter.alpha is not None
    layers = adapter.layers if uniform else {name: _scaled(layer, dtype) for name, layer in adapter.layers.items()}
    tensors = {}
    for name, layer in layers.items():
        tensors |= _pair(PUBLISHED, name, ("lora_A", "lora_B"), layer, dtype)
    stated = {"lora_rank": adapter.rank, "lora_alpha": adapter.alpha} if uniform else {}
    save_torch(path, {ENTRY: tensors, **stated, **_about(adapter)})


def _write_peft(path: Path, adapter: Adapter, dtype: torch.dtype | None) -> None:
    tensors = {}
    for name, layer in adapter.layers.items():
        tensors |= _pair(PUBLISHED, name, ("lora_A", "lora_B"), layer, dtype)
    ranks = {name: layer.rank for name, layer in adapter.layers.items()}
    alphas = {name: layer.scale * layer.rank for name, layer in adapter.layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": list(adapter.layers),
    }
    partial = path.with_name(path.name + ".tmp")
    try:
        save_state(partial / PEFT_WEIGHTS, tensors, _about(adapter))
        (partial / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_diffusers(path: Path, adapter: Adapter, dtype: torch.dtype | None) -> None:
    tensors = {}
    for name, layer in adapter.layers.items():
        tensors |= _pair("transformer.", rename(name, TO_DIFFUSERS), ("lora_A", "lora_B"), _scaled(layer, dtype), dtype)
    save_state(path, tensors, _about(adapter))


def _write_down_up(path: Path, adapter: Adapter, dtype: torch.dtype | None, flat: bool) -> None:
    tensors = {}
    for name, layer in adapter.layers.items():
        prefix, written = ("lora_unet_", name.replace(".", "_")) if flat else ("diffusion_model.", name)
        tensors |= _pair(prefix, written, ("lora_down", "lora_up"), layer, dtype)
        tensors[f"{prefix}{written}.alpha"] = torch.tensor(layer.scale * layer.rank, dtype=torch.float32)
    save_state(path, tensors, _about(adapter))


def _about(adapter: Adapter) -> dict[str, Any]:
    """What is said of the adapter beside its tensors."""
    return {key: adapter.metadata[key] for key in ABOUT if key in adapter.metadata}


WRITERS = {
    "published": (".pt", _write_published),
    "peft": ("", _write_peft),
    "diffusers": (".safetensors", _write_diffusers),
    "comfyui": (".safetensors", lambda path, adapter, dtype: _write_down_up(path, adapter, dtype, flat=False)),
    "kohya": (".safetensors", lambda path, adapter, dtype: _write_down_up(path, adapter, dtype, flat=True)),
}
