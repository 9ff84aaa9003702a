"""Quantised weights in checkpoints: pure functions between a state dict and (quantised tensors by parameter name, everything else).

Ours, for safetensors: keys `NAME.FORMAT.PART` (`blocks.0.ffn.0.weight.nvfp4.codes`), linear scales, and in the file's metadata one JSON header that says
what each tensor is. NVFP4 tensors also carry `gscale`, the decode scale amax / (E M), for readers that know no scale rules.

Nothing is believed twice: a tensor whose numbers contradict its rule is refused, because a wrong rule silently multiplies every weight by 0.57 or 1.75.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..ops import fp4
from ..ops.fp8 import DTYPE, LARGEST
from ..ops.nvfp4 import GROUP, NVFP4, RULES
from ..ops.packed import PackedTensor, from_state

HEADER = "longlive_quantised"
VERSION = 1
GSCALE = "gscale"
FOUR_OVER_SIX_SCALES = (256.0, 384.0)


def to_plain(quantised: Mapping[str, PackedTensor], rest: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) for `models.weights.save_state`. Raises CheckpointError when a name is in both."""
    tensors, described = {}, {}
    for name, packed in quantised.items():
        if name in rest:
            raise CheckpointError(f"{name} is given both quantised and not; keep one of them")
        packed = packed.linear() if isinstance(packed, NVFP4) else packed
        described[name] = packed.describe()
        tensors |= {f"{name}.{packed.name}.{part}": tensor for part, tensor in packed.state().items()}
        if isinstance(packed, NVFP4):
            tensors[f"{name}.{packed.name}.{GSCALE}"] = packed.decode_scale
    return tensors | dict(rest), {HEADER: json.dumps({"version": VERSION, "tensors": described})}


def is_quantised(metadata: Mapping[str, Any]) -> bool:
    """Whether the metadata of a file says that it holds our quantised form."""
    return HEADER in metadata


def from_plain(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> tuple[dict[str, PackedTensor], dict[str, Tensor]]:
    """(quantised tensors by parameter name, the rest) of what `to_plain` made; a file without the header is all rest.

    Raises CheckpointError for a header of another version, a missing or damaged part, parts without a header, and a rule that the numbers contradict.
    """
    header = _header(metadata)
    rest, quantised = dict(tensors), {}
    for name, description in header.items():
        prefix = f"{name}.{description.get('format')}."
        parts = {key.removeprefix(prefix): rest.pop(key) for key in list(rest) if key.startswith(prefix)}
        gscale = parts.pop(GSCALE, None)
        try:
            quantised[name] = from_state(parts, description)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        if isinstance(quantised[name], NVFP4):
            check_rule(name, quantised[name])
            if gscale is not None and not torch.equal(gscale, quantised[name].decode_scale):
                raise CheckpointError(f"{name}: gscale is not amax / {quantised[name].product:g}; the file is damaged: save it again")
    stray = [key for key in rest if any(f".{known}." in key for known in PackedTensor.formats)]
    if stray:
        raise CheckpointError(f"{stray[0]} is part of a quantised tensor that the file's metadata does not describe; save the file again, with its metadata")
    return quantised, rest


def _header(metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    try:
        header = json.loads(metadata.get(HEADER, '{"version": 1, "tensors": {}}'))
        version, described = header["version"], header["tensors"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"the metadata {HEADER} of the file cannot be read; save the file again") from None
    if version != VERSION:
        raise CheckpointError(f"the file holds quantised weights of version {version} and this program reads {VERSION}; use a newer version of it")
    return described


def possible_rules(packed: NVFP4) -> tuple[str, ...]:
    """The scale rules under which these codes and scales can have been made from a whole tensor (spec nvfp4 §2.4).

    The group of the largest value has scale 448 under the static rules, and its largest code stands for 6 under static_6, for 4 under static_4. Under
    four over six the largest scale lies in 256..384. All zeros fit every rule; what was made from a shard, or is damaged, may fit none.
    """
    even = packed.linear()
    scales = even.scales.view(DTYPE).float()
    largest = scales.max().item() if scales.numel() else 0.0
    codes = fp4.unpack(even.codes).unflatten(-1, (-1, GROUP))
    if largest == 0:
        return tuple(RULES) if not (codes & 7).any() else ()
    if largest == LARGEST:
        top = fp4.decode(codes[scales == LARGEST] & 7).max().item()
        return tuple(name for name, rule in RULES.items() if rule.error is None and rule.code == top)
    low, high = FOUR_OVER_SIX_SCALES
    return tuple(name for name, rule in RULES.items() if rule.error is not None) if low <= largest <= high else ()


def check_rule(name: str, packed: NVFP4) -> None:
    """Raises CheckpointError when the numbers of `packed` cannot come from its rule, or its amax is no largest magnitude."""
    amax = packed.amax.item()
    if not 0 <= amax < math.inf:
        raise CheckpointError(f"{name} has the largest value (amax) {amax:g}, which is that of no tensor; take the original file")
    possible = possible_rules(packed)
    if packed.rule not in possible:
        found = f"its numbers come from {' or '.join(possible)}" if possible else "its numbers come from no rule for whole tensors"
        factor = f" and every weight would be off by {packed.product / _product(possible[0]):.3g}" if possible else ""
        remedy = "name the rule that the weights were quantised with" if possible else "take the original file"
        raise CheckpointError(f"{name} is said to be quantised by {packed.rule}, but {found}{factor}; {remedy}")


def _product(rule: str) -> float:
    return RULES[rule].code * RULES[rule].scale
