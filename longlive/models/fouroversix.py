"""The published container of NVFP4 weights ("FourOverSix"), read and written as plain dictionaries (spec nvfp4 §2.4).

A linear layer at PATH has no weight but PATH.quantized_weight_values (uint8, two codes a byte, filled to 128 rows x 64 columns), ..._scale_factors (E4M3,
flat, swizzled), ..._amax (float32, [1] or without dimensions), ..._metadata (int32: rows, columns, filled rows, filled columns), and its bias. The scale
rule does not stand in the tensors, so that it is checked against them.

Legend: R rows, K columns, R' and K' filled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import CheckpointError
from ..ops.nvfp4 import ALIASES, GROUP, LINEAR, NVFP4, RULES
from ..ops.scale_layout import round_up, swizzle, swizzled_size, unswizzle
from .quantised_files import check_rule

FORMAT, VERSION = "longlive_generator_nvfp4", 1
MERGED_BF16 = "longlive_generator_merged_bf16"
REFUSED = {"longlive_generator_te_nvfp4": "save it again as merged bf16 (backend transformer_engine), which is quantised when it is loaded"}
PREFIX = "model."
WEIGHT, LEAF = ".weight", ".quantized_weight_"
PARTS = ("values", "scale_factors", "amax", "metadata")
ROWS, COLUMNS = 128, 64
TYPES = {"values": (torch.uint8,), "scale_factors": (torch.float8_e4m3fn, torch.uint8), "amax": (torch.float32,), "metadata": (torch.int32, torch.int64)}


def is_fouroversix(names) -> bool:
    """Whether these keys are of a container with packed weights."""
    return any(name.endswith(LEAF + "values") for name in names)


def rule_of(content: Mapping[str, Any]) -> str:
    """The rule of the weights that a container names: weight_scale_rule, else scale_rule, of its `quantization` record.

    Raises CheckpointError for another format or version, and where no known rule is named.
    """
    found, version = content.get("checkpoint_format"), content.get("checkpoint_version")
    if found in REFUSED:
        raise CheckpointError(f"the checkpoint is of the format {found}, which is not read; {REFUSED[found]}")
    if found != FORMAT or version != VERSION:
        raise CheckpointError(f"the checkpoint says format {found!r}, version {version!r}, and packed weights are {FORMAT!r}, version {VERSION}; save it again")
    record = content.get("quantization")
    record = record if isinstance(record, Mapping) else {}
    rule = record.get("weight_scale_rule") or record.get("scale_rule")
    rule = ALIASES.get(rule, rule)
    if rule not in RULES:
        raise CheckpointError(f"the checkpoint's quantization record names the scale rule {rule!r}; known are {', '.join(RULES)}; save it again")
    return rule


def read(state: Mapping[str, Tensor], rule: str, *, tile: int = 1, dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, NVFP4], dict[str, Tensor]]:
    """(NVFP4 weights by parameter name, the rest) of a container's state dict; the prefix `model.` is taken off both.

    `rule` is `rule_of` the container, or what the configuration says; it is checked against the numbers of every tensor. Raises CheckpointError for a wrong
    rule, a missing part, a part that a cast or a truncation destroyed, and a weight that is there packed and unpacked.
    """
    state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    paths = sorted({name.split(LEAF)[0] for name in state if LEAF in name})
    weights = {}
    for path in paths:
        parts = {part: state.pop(path + LEAF + part) for part in PARTS if path + LEAF + part in state}
        for name in [name for name in state if name.startswith(path + LEAF + "transposed_")]:
            del state[name]  # a second copy for training
        if path + WEIGHT in state:
            raise CheckpointError(f"{path} holds its weight both packed and unpacked; save the checkpoint again")
        weights[path + WEIGHT] = _read_one(path, parts, rule, tile, dtype)
        check_rule(path + WEIGHT, weights[path + WEIGHT])
    left = next((name for name in state if LEAF in name), None)
    if left is not None:
        raise CheckpointError(f"{left} is no part of a packed weight that is known; known are {', '.join(PARTS)}")
    return weights, state


def _read_one(path: str, parts: dict[str, Tensor], rule: str, tile: int, dtype: torch.dtype) -> NVFP4:
    missing = [LEAF[1:] + part for part in PARTS if part not in parts]
    if missing:
        raise CheckpointError(f"{path} lacks {missing[0]}; the checkpoint is incomplete: save it again")
    for part, tensor in parts.items():
        if tensor.dtype not in TYPES[part]:
            kinds = " or ".join(str(t) for t in TYPES[part])
            raise CheckpointError(f"{path}: {LEAF[1:]}{part} is {tensor.dtype}, not {kinds}: a cast of the whole file destroyed it; take the original file")
    if parts["metadata"].numel() != 4 or parts["amax"].numel() != 1:
        raise CheckpointError(f"{path}: metadata must hold 4 numbers and amax 1, not {parts['metadata'].numel()} and {parts['amax'].numel()}; save it again")
    rows, columns, filled_rows, filled_columns = parts["metadata"].tolist()
    groups = filled_columns // GROUP
    fits = 0 < rows <= filled_rows and 0 < columns <= filled_columns and filled_columns % GROUP == 0
    fits = fits and tuple(parts["values"].shape) == (filled_rows, filled_columns // 2) and parts["scale_factors"].numel() == swizzled_size(filled_rows, groups)
    if not fits:
        sizes = f"values {list(parts['values'].shape)}, {parts['scale_factors'].numel()} scales"
        raise CheckpointError(f"{path}: {sizes} do not fit metadata {parts['metadata'].tolist()}; the checkpoint is damaged: fetch it again")
    scales = unswizzle(parts["scale_factors"].view(torch.uint8).flatten(), filled_rows, groups)
    kept = round_up(columns, GROUP)
    codes = parts["values"][:rows, : kept // 2].contiguous()
    return NVFP4(codes, scales[:rows, : kept // GROUP].contiguous(), parts["amax"].reshape(()), rule, tile, (rows, columns), dtype, LINEAR)


def write(weights: Mapping[str, NVFP4], rest: Mapping[str, Tensor], *, amax_shape: tuple[int, ...] = (1,)) -> dict[str, Tensor]:
    """The state dict of a container, with the prefix `model.`. All weights are matrices named PATH.weight.

    amax is [1], which every published loader takes; the published CPU code writes it without dimensions (`amax_shape` ()).
    """
    state = {PREFIX + name: tensor for name, tensor in rest.items()}
    for name, packed in weights.items():
        if not name.endswith(WEIGHT) or len(packed.shape) != 2:
            raise CheckpointError(f"{name} {list(packed.shape)} has no place in a published container, which packs the weights of linear layers")
        packed, path = packed.linear(), PREFIX + name.removesuffix(WEIGHT) + LEAF
        (rows, columns), filled_rows, filled_columns = packed.shape, round_up(packed.shape[0], ROWS), round_up(packed.shape[1], COLUMNS)
        fill = (0, filled_columns // 2 - packed.codes.shape[1], 0, filled_rows - rows)
        scales = F.pad(packed.scales, (0, filled_columns // GROUP - packed.groups, 0, filled_rows - rows))
        state[path + "values"] = F.pad(packed.codes, fill)
        state[path + "scale_factors"] = swizzle(scales).view(torch.float8_e4m3fn)
        state[path + "amax"] = packed.amax.reshape(amax_shape)
        state[path + "metadata"] = torch.tensor([rows, columns, filled_rows, filled_columns], dtype=torch.int32)
    return state


def container(weights: Mapping[str, NVFP4], rest: Mapping[str, Tensor], record: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What `torch.save` writes: the state under `generator`, format and version, the `quantization` record with the weights' rule, and `more`
    (model_name, source paths, merged_lora). Raises CheckpointError when the weights do not share one rule."""
    rules = sorted({packed.rule for packed in weights.values()})
    if len(rules) != 1:
        found = ", ".join(rules) or "no weights"
        raise CheckpointError(f"a published container has one scale rule for its weights, not {len(rules)} ({found}); quantise them alike")
    two_d = any(packed.tile != 1 for packed in weights.values())
    quantization = {
        "format": "nvfp4", "backend": "fouroversix", "materialized": True, "dtype": "nvfp4", "scale_rule": rules[0],
        **record, "weight_scale_rule": rules[0], "weight_scale_2d": two_d,
        "materialized_modules": sorted(name.removesuffix(WEIGHT) for name in weights),
    }  # fmt: skip
    return {"generator": write(weights, rest), "checkpoint_format": FORMAT, "checkpoint_version": VERSION, "quantization": quantization, **more}


def check_configured(named: str | None, configured: str | None) -> None:
    """Raises CheckpointError when the rule that a file names and that of the configuration are both there and scale differently."""
    wanted = ALIASES.get(configured, configured)
    if named is not None and wanted is not None and RULES[named][:2] != RULES[wanted][:2]:
        raise CheckpointError(f"the checkpoint was quantised by {named} and the configuration says {wanted}; set the weight scale rule to {named}")


def read_container(content: Mapping[str, Any], state: Mapping[str, Tensor], configured: str | None = None) -> tuple[dict[str, NVFP4], dict[str, Tensor]]:
    """`read` of `state`, the chosen entry of `content` without wrappers in its names, by the rule that the container names.

    `configured`, the rule of the configuration, is needed for a bare state dict, which names none. Raises CheckpointError when both are there and scale
    differently, and when neither is.
    """
    named = rule_of(content) if "checkpoint_format" in content else None
    wanted = ALIASES.get(configured, configured)
    check_configured(named, configured)
    if named is None and wanted is None:
        raise CheckpointError("the state dict holds packed weights and names no scale rule; set the weight scale rule that they were quantised with")
    record = content.get("quantization")
    tile = GROUP if isinstance(record, Mapping) and record.get("weight_scale_2d") else 1
    return read(state, named or wanted, tile=tile)
