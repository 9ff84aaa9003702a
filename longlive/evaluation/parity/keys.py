"""Recomputes the key tables: names and shapes of the full-size models (no memory is used), and what loaders take from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ...core.errors import CheckpointError, NotAvailable
from ...models.fouroversix import write
from ...models.keymaps import light_vae_name, strip_fsdp
from ...models.lora import adapter_of, adapter_state, attach
from ...models.spec import WAN22_TI2V_5B, WAN22_VAE, DiTDims
from ...models.umt5 import published_names, umt5_model, umt5_xxl_config
from ...models.wan_dit import WanDiT
from ...models.wan_vae import WanVAE
from ...models.weights import build_on_meta, unwrap_generator
from ...ops.nvfp4 import quantise
from ...precision.selection import DEFAULT_FILTER, filtered, quantised_linears

# Fields of a table that are words about the published code: nothing to compute. Ours is strict always and strips every wrapper.
PROSE = {
    "loader_unwrap_and_strip": {
        "strip_applied": "says when the published loader strips wrappers; ours always does",
        "strict": "says when the published loader is strict; ours always is",
        "lora": "says where the published loader finds a LoRA; ours looks there too (models.lora_files.read_lora)",
    }
}
CONTAINERS = (
    {"generator": "G"},
    {"generator": "G", "generator_ema": "E"},
    {"generator_ema": "E"},
    {"model": "M"},
    {"model": "M", "generator": "G"},
    {"other": "O"},
)
WRAPPED = (
    "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.self_attn.q.weight",
    "_fsdp_wrapped_module.model.head.head.weight",
    "model.blocks.0._checkpoint_wrapped_module.ffn.0.weight",
    "model._orig_mod.patch_embedding.weight",
)
RESNET = ("norm1.gamma", "conv1.weight", "norm2.gamma")


def run_case(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The table that `given["what"]` names. Raises NotAvailable for the tables of quantised models."""
    tables: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "dit": _dit,
        "t5": _t5,
        "vae": lambda given: _table(build_on_meta(lambda: WanVAE(WAN22_VAE))),
        "lightvae": lambda given: _table(build_on_meta(lambda: WanVAE(WAN22_VAE.pruned(given["rate"])))),
        "lightmap": lambda given: {"map": {key: light_vae_name(key) for key in _diffusers_keys()}},
        "strip": _loading,
        "lora": _lora,
        "quantmods": _quantised,
    }
    if given["what"] not in tables:
        raise NotAvailable(f"the key table {name!r}", f"known are {', '.join(tables)}")
    return tables[given["what"]](given)


def _quantised(given: dict[str, Any]) -> dict[str, Any]:
    """Layers packed by default, what the list keeps, and the container's keys. The published norms without weights are modules; ours are functions."""
    model = WanDiT(_dims(given)).bfloat16()
    converted = quantised_linears(model)
    norms = [f"blocks.{block}.norm{number}" for block in range(len(model.blocks)) for number in (1, 2)]
    state = model.state_dict()
    packed = {f"{name}.weight": quantise(state.pop(f"{name}.weight")) for name in converted}
    keys = {name.removeprefix("model."): tensor for name, tensor in write(packed, state, amax_shape=()).items()}
    skipped = filtered([*dict(model.named_modules()), *norms], DEFAULT_FILTER)
    return {"converted": sorted(converted), "skipped": sorted(skipped), "keys": sorted(_rows(keys))}


def _rows(state: dict[str, Any]) -> list[list[Any]]:
    return [[key, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for key, tensor in state.items()]


def _table(model: nn.Module) -> dict[str, Any]:
    return {"keys": _rows(model.state_dict()), "parameters": sum(p.numel() for p in model.parameters())}


def _dims(given: dict[str, Any]) -> DiTDims:
    if "dit" not in given:
        return WAN22_TI2V_5B.dit
    d = given["dit"]
    return DiTDims(
        dim=d["dim"], ffn=d["ffn"], layers=d["layers"], heads=d["heads"], freq_dim=d["freq_dim"],
        text_dim=d["text_dim"], text_len=d["text_len"], channels=d["ch"],
    )  # fmt: skip


def _lora(given: dict[str, Any]) -> dict[str, Any]:
    """A fresh adapter as a trainer saves it; the published table lists its keys in alphabetical order."""
    dit = build_on_meta(lambda: WanDiT(_dims(given)))
    trainable = attach(dit, WAN22_TI2V_5B, given["rank"])
    adapter = adapter_of(dit)
    rows = sorted(_rows(adapter_state(dit)))
    return {"keys": rows, "r": adapter.rank, "lora_alpha": int(adapter.alpha), "trainable": sum(p.numel() for p in trainable)}


def _dit(given: dict[str, Any]) -> dict[str, Any]:
    dims = _dims(given)
    table = _table(build_on_meta(lambda: WanDiT(dims)))
    return table | {"keys": sorted(table["keys"], key=lambda row: _published_place(row[0])), "checkpoint_prefix": "model."}


def _published_place(key: str) -> tuple:
    """Where the published state dict lists a DiT key: by part of the model, in a block modulation first."""
    order = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks", "head")
    inside = ("modulation", "self_attn", "norm3", "cross_attn", "ffn", "head")
    parts = key.split(".")
    block, rest = (int(parts[1]), parts[2:]) if parts[0] == "blocks" else (0, parts[1:])
    leaf = ("q", "k", "v", "o", "norm_q", "norm_k")
    return (
        order.index(parts[0]),
        block,
        inside.index(rest[0]) if rest[0] in inside else 0,
        leaf.index(rest[1]) if len(rest) > 1 and rest[1] in leaf else 0,
        [part for part in rest if part.isdigit()],
        parts[-1] == "bias",
    )


def _t5(given: dict[str, Any]) -> dict[str, Any]:
    model = umt5_model(umt5_xxl_config())
    state = model.state_dict()
    names = published_names(model)
    return {"keys": _rows({ours: state[theirs] for ours, theirs in names.items()}), "parameters": sum(p.numel() for p in model.parameters())}


def _loading(given: dict[str, Any]) -> dict[str, Any]:
    taken = [{"checkpoint": container, "use_ema": ema, "taken": _taken(container, ema)} for container in CONTAINERS for ema in (False, True)]
    return {"unwrap": taken, "strip": {key: strip_fsdp(key) for key in WRAPPED}}


def _taken(container: dict[str, str], use_ema: bool) -> Any:
    """What is taken; the published loader's KeyError is our refusal."""
    try:
        return unwrap_generator(container, use_ema)
    except CheckpointError:
        return "KeyError"


def _diffusers_keys() -> list[str]:
    """One diffusers-style key for every rule of the map."""
    keys = ["dynamic_feature_projection_heads.0.weight", "quant_conv.weight", "post_quant_conv.bias"]
    for side, stages, resnets, sampler in (("encoder", "down_blocks.1", 2, "downsampler"), ("decoder", "up_blocks.1", 3, "upsampler")):
        keys += [f"{side}.{key}" for key in ("conv_in.weight", "mid_block.attentions.0.to_qkv.weight", "mid_block.attentions.0.norm.gamma")]
        keys += [f"{side}.norm_out.gamma", f"{side}.conv_out.bias"]
        keys += [f"{side}.mid_block.resnets.{i}.{key}" for i in (0, 1) for key in (*RESNET, "conv2.bias")]
        keys += [f"{side}.{stages}.resnets.{i}.{key}" for i in range(resnets) for key in (*RESNET, "conv2.weight", "conv_shortcut.weight")]
        keys += [f"{side}.{stages}.{sampler}.{key}" for key in ("resample.1.weight", "time_conv.weight")]
    return keys
