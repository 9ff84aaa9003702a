"""Recomputes recorded 4-bit numbers: quantised matrices, a quantised linear layer, quantised keys.

Recorded matrices are filled with zeros to 128 rows and 64 columns, packed as ours, scales linear and swizzled. Recorded float32 values multiply by amax and
divide by E M at the end; ours multiply by the quotient, which rounds elsewhere in float32 and equals them in bfloat16.

Legend: R rows, K columns, k = K / 16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import NotAvailable
from ...ops import fp4
from ...ops.fp8 import to_e4m3
from ...ops.hadamard import hadamard, hadamard_matrix
from ...ops.nvfp4 import GROUP, NVFP4, RULES, quantise
from ...ops.quant_matmul import w4a4
from ...ops.scale_layout import round_up, swizzle
from .entries import Entry

ROWS, COLUMNS = 128, 64
SATURATED = "elements whose scaled magnitude exceeds 6 excluded"
SETTINGS = {SATURATED: lambda output: output}


def run(entry: Entry) -> dict[str, Tensor]:
    """The wanted outputs of an `nvfp4` file (config.kind `quant`, `linear` or `kv`)."""
    kinds = {"quant": _matrices, "linear": _linear, "kv": _keys}
    kind = entry.config["kind"]
    if kind not in kinds:
        raise NotAvailable(f"4-bit numbers of kind {kind!r}", f"the kinds are {', '.join(kinds)}")
    return kinds[kind](entry)


def recorded_form(packed: NVFP4) -> tuple[Tensor, Tensor]:
    """Codes [R', K' / 2] and linear scales [R', k'] filled with zeros to multiples of 128 x 64."""
    rows, columns = packed.shape
    fill = (0, round_up(columns, COLUMNS) // 2 - packed.codes.shape[-1], 0, -rows % ROWS)
    return F.pad(packed.codes, fill), F.pad(packed.scales, (0, round_up(columns, COLUMNS) // GROUP - packed.groups, 0, -rows % ROWS))


def _matrices(entry: Entry) -> dict[str, Tensor]:
    x, out = entry.inputs["x"], {}
    for kind, two_d, turned in entry.config["kinds"]:
        source = hadamard(x) if turned else x
        if turned:
            out |= {"rht_matrix": hadamard_matrix(), "x_rht": source}
        for rule in entry.config["rules"]:
            packed = quantise(source, rule, tile=16 if two_d else 1)
            codes, scales = recorded_form(packed)
            values = packed.products() * packed.amax / torch.full((), packed.product)
            parts = {"amax": packed.amax.reshape(1), "scales": scales, "scales_blocked": swizzle(scales), "values": codes}
            parts |= {"dequant": values, "dequant_bf16": packed.dequantise(torch.bfloat16)}
            out |= {f"{kind}.{rule}.{name}": part for name, part in parts.items()}
    return {name: out[name] for name in entry.wanted if name in out}


def _linear(entry: Entry) -> dict[str, Tensor]:
    weight, bias, x, out = *(entry.inputs[name] for name in ("weight", "bias", "x")), {}
    for rule in entry.config["rules"]:
        packed = quantise(weight, rule)
        codes, scales = recorded_form(packed)
        y = w4a4(quantise(x.flatten(0, -2), rule), packed, bias).unflatten(0, x.shape[:-1])
        sizes = torch.tensor([*weight.shape, codes.shape[0], codes.shape[1] * 2], dtype=torch.int32)
        parts = {"w_amax": packed.amax.reshape(1), "w_metadata": sizes, "w_scale_factors": swizzle(scales), "w_values": codes, "y": y}
        out |= {f"{rule}.{name}": part for name, part in parts.items()}
    return {name: out[name] for name in entry.wanted if name in out}


def _keys(entry: Entry) -> dict[str, Tensor]:
    """Recorded keys have one amax a block of tokens, over all heads, and keep their mean."""
    out = {}
    for rule in entry.config["rules"]:
        values = []
        for number, block in enumerate(entry.inputs["k"].split(entry.config["tokens_per_block"], 1)):
            packed = quantise(block.flatten(0, -2), rule)
            codes, scales = recorded_form(packed)
            out |= {f"{rule}.values{number}": codes, f"{rule}.scales{number}": swizzle(scales), f"{rule}.amax{number}": packed.amax.reshape(1)}
            values.append(packed.dequantise().reshape(block.shape))
        out[f"{rule}.deq"] = torch.cat(values, 1)
    return {name: out[name] for name in entry.wanted if name in out}


def keep(entry: Entry, name: str) -> Tensor | None:
    """Under `SATURATED`: bool of the output's shape, True where it is compared; None compares everything.

    The published quantiser turns what rounds past 6 into -0 and then judges its block by that, so that whole blocks of 16 are left out.
    """
    if entry.setting != SATURATED or name.count(".") != 2 or name.endswith(".amax"):
        return None
    kind, rule, part = name.split(".")
    x = hadamard(entry.inputs["x"]) if kind == "1d_rht" else entry.inputs["x"]
    rows, columns = x.shape
    blocks = F.pad(x.float(), (0, -columns % COLUMNS, 0, -rows % ROWS)).unflatten(-1, (-1, GROUP))
    fine = ~overflowing(blocks, rule)
    wide = {"scales": fine, "values": fine.repeat_interleave(GROUP // 2, 1), "scales_blocked": swizzle(fine)}
    return wide[part] if part in wide else fine.repeat_interleave(GROUP, 1)[:rows, :columns]


def overflowing(blocks: Tensor, rule: str) -> Tensor:
    """bool [R, k]: blocks [R, k, 16] in which a value rounds past 6 under one of the scales that the rule tries."""
    code, scale, error = RULES[rule]
    encode = torch.full((), code * scale) / blocks.abs().max()
    largest, found = blocks.abs().amax(-1), []
    for factor in (1.0, 1.5) if error else (1.0,):
        scales = to_e4m3(largest / torch.full((), code) * encode * factor).float()
        found.append((scales > 0) & (largest / scales * encode > 2 * fp4.LARGEST - 5.0))
    return torch.stack(found).any(0)
