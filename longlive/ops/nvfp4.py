"""NVFP4: E2M1 codes in groups of 16, one E4M3 scale a group, one float32 number (amax) for the whole: value = code * scale * amax / (E M).

E and M are the code and the scale that the largest value is mapped to. Scale rules (spec nvfp4 §1.4, §2.1):

* `static_6`, `static_4`: the largest of a group becomes 6 (4); M = 448
* `mse`, `mae`, `abs_max`: "four over six". Each group tries 6 and 4 and keeps what is nearer to the data after rounding; M = 256, so that 1.5 times fits

A group is 16 values of a row (tile 1), or 16 x 16 values (tile 16), whose scale is repeated in 16 rows, so that a matrix and its transpose
have equal codes. Order of operations: spec nvfp4 §1.5 (a), the one of the published implementation; the result is bit-exact with it.

Legend: R rows, K values of a row, k = K / 16 rounded up; leading dimensions are independent tensors, each with its own amax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..core.errors import CheckpointError, ConfigError, InputError
from . import fp4
from .fp8 import DTYPE, to_e4m3, to_e4m3_up
from .packed import PackedTensor, check_part, divided, dtype_named, finite_or_refuse
from .scale_layout import round_up, swizzle, swizzled_size, unswizzle

GROUP = 16
TILES = (1, GROUP)
LINEAR, SWIZZLED = "linear", "swizzled"
NAN_SCALE = 0x7F
FLOAT_MAX = torch.finfo(torch.float32).max


class Rule(NamedTuple):
    """`code` (E) and `scale` (M) of the largest value; `error`: how four-over-six judges, None for a static rule."""

    code: float
    scale: float
    error: str | None = None


RULES = {
    "static_6": Rule(6.0, 448.0),
    "static_4": Rule(4.0, 448.0),
    "mse": Rule(6.0, 256.0, "mse"),
    "mae": Rule(6.0, 256.0, "mae"),
    "abs_max": Rule(6.0, 256.0, "abs_max"),
}
ALIASES = {"l1_norm": "mae"}


def rule_named(name: str) -> str:
    """`name` without an alias. Raises ConfigError for an unknown rule."""
    name = ALIASES.get(name, name)
    if name not in RULES:
        raise ConfigError(f"unknown NVFP4 scale rule {name!r}; use one of {', '.join(RULES)}")
    return name


@dataclass(frozen=True, eq=False)
class NVFP4(PackedTensor):
    """A quantised tensor [..., R, K].

    codes   uint8 [..., R, 8 k], two codes a byte; columns beyond K hold zeros
    scales  uint8 [..., R, k] (E4M3 bits), or [..., T * 512] in the swizzled layout
    amax    float32 [...]: max|x| of what was quantised
    """

    codes: torch.Tensor
    scales: torch.Tensor
    amax: torch.Tensor
    rule: str
    tile: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = LINEAR

    name = "nvfp4"
    parts = ("codes", "scales", "amax")

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.codes.shape[-1] * 2 // GROUP

    @property
    def product(self) -> float:
        """E M of the rule: amax / (E M) is the decode scale."""
        return RULES[self.rule].code * RULES[self.rule].scale

    @property
    def decode_scale(self) -> torch.Tensor:
        """float32 [...]: amax / (E M)."""
        return divided(self.amax, self.product)

    def linear(self) -> NVFP4:
        """The same with linear scales."""
        if self.layout == LINEAR:
            return self
        return replace(self, scales=unswizzle(self.scales, self.shape[-2], self.groups), layout=LINEAR)

    def swizzled(self) -> NVFP4:
        """The same with swizzled scales."""
        return self if self.layout == SWIZZLED else replace(self, scales=swizzle(self.scales), layout=SWIZZLED)

    def products(self) -> torch.Tensor:
        """float32 [..., R, K]: code * scale, exact in float32, bfloat16 and float16 alike (at most 6 significant bits, 2^-10 to 2688)."""
        even = self.linear()
        codes = fp4.decode(fp4.unpack(even.codes)).unflatten(-1, (-1, GROUP))
        scales = even.scales.view(DTYPE).to(torch.float32)
        return (codes * scales.unsqueeze(-1)).flatten(-2)[..., : self.shape[-1]]

    def dequantise(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """float32((code * scale) * (amax / (E M))), rounded once more to `dtype` (default: the tensor's own)."""
        return (self.products() * self.decode_scale[..., None, None]).to(dtype or self.dtype)

    def describe(self) -> dict[str, Any]:
        rule = RULES[self.rule]
        return {
            "format": self.name, "rule": self.rule, "e2m1_max": rule.code, "e4m3_max": rule.scale, "tile": self.tile,
            "layout": self.layout, "shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip

    @classmethod
    def build(cls, parts: dict[str, torch.Tensor], description: dict[str, Any]) -> NVFP4:
        shape, rule, tile, layout = tuple(description["shape"]), description["rule"], description["tile"], description["layout"]
        if rule not in RULES or tile not in TILES or layout not in (LINEAR, SWIZZLED):
            raise CheckpointError(f"an nvfp4 tensor of rule {rule!r}, tile {tile!r}, layout {layout!r} is unknown; use a newer version, or the bf16 weights")
        if (description["e2m1_max"], description["e4m3_max"]) != RULES[rule][:2]:
            said = f"{description['e2m1_max']} x {description['e4m3_max']}"
            raise CheckpointError(f"an nvfp4 tensor of rule {rule} says that it maps to {said}, which is another rule; take the original file")
        *lead, rows, columns = shape
        groups = round_up(columns, GROUP) // GROUP
        check_part("codes", parts["codes"], torch.uint8, (*lead, rows, groups * GROUP // 2))
        check_part("scales", parts["scales"], torch.uint8, (*lead, rows, groups) if layout == LINEAR else (*lead, swizzled_size(rows, groups)))
        check_part("amax", parts["amax"], torch.float32, tuple(lead))
        return cls(parts["codes"], parts["scales"], parts["amax"], rule, tile, shape, dtype_named(description["dtype"]), layout)


def quantise(
    x: torch.Tensor,
    rule: str = "mse",
    *,
    tile: int = 1,
    amax: torch.Tensor | None = None,
    bits: torch.Tensor | None = None,
    on_nonfinite: str = "raise",
) -> NVFP4:
    """`x` [..., R, K] in NVFP4, linear scales.

    `amax` float32 [...]: the largest |x| of a whole of which this is a shard; shards with the same amax quantise as the whole does (tile 16: shards of
    whole tiles). `bits`, integers in [0, 2^24) of x's shape (`ops.random_bits`): round stochastically. Scales are then rounded up, so that nothing
    saturates, and four-over-six chooses as if it rounded to nearest, so that the choice knows nothing of the noise: the mean is x (spec nvfp4 §2.3).

    Zeros: codes, scales and amax 0. A tensor so small that E M / amax overflows float32 (amax below 8e-36): codes and scales 0. Infinity or NaN: InputError,
    or with on_nonfinite "nan" NaN scales in the groups that hold one, and no synchronisation with a GPU. Raises ConfigError for an unknown rule or tile.
    """
    rule = rule_named(rule)
    if tile not in TILES:
        raise ConfigError(f"NVFP4 scales cover 1 x 16 or 16 x 16 values, not {tile} x 16; use tile 1 or 16")
    if x.dim() < 2:
        raise InputError(f"NVFP4 quantises matrices and the tensor has shape {list(x.shape)}; give it rows")
    wide = x.to(torch.float32)
    whole = wide.abs().amax((-2, -1)) if amax is None else amax.to(torch.float32)
    finite_or_refuse(whole, on_nonfinite)
    if on_nonfinite == "nan" and amax is None:
        whole = torch.where(wide.isfinite(), wide, 0).abs().amax((-2, -1))
    blocks = _blocks(wide, tile)
    broken = ~blocks.isfinite().all(-1, keepdim=True)
    blocks = torch.where(broken, 0, blocks)
    noise = None if bits is None else _blocks(bits, tile)
    codes, scales = _encode(blocks, whole, RULES[rule], tile, noise)
    scales = torch.where(broken.squeeze(-1), NAN_SCALE, scales.view(torch.uint8))
    rows, columns = x.shape[-2:]
    codes = _rows_of(codes, tile)[..., :rows, :]
    scales = scales.repeat_interleave(tile, -2)[..., :rows, :]
    return NVFP4(fp4.pack(codes), scales.contiguous(), whole, rule, tile, tuple(x.shape), x.dtype)


def _blocks(x: torch.Tensor, tile: int) -> torch.Tensor:
    """[..., R, K] -> [..., R / tile, k, tile * 16], filled with zeros."""
    filled = F.pad(x, (0, -x.shape[-1] % GROUP, 0, -x.shape[-2] % tile))
    return filled.unflatten(-1, (-1, GROUP)).unflatten(-3, (-1, tile)).transpose(-3, -2).flatten(-2)


def _rows_of(blocks: torch.Tensor, tile: int) -> torch.Tensor:
    """The inverse of `_blocks`, fill included."""
    return blocks.unflatten(-1, (tile, GROUP)).transpose(-3, -2).flatten(-4, -3).flatten(-2)


def _encode(blocks: torch.Tensor, amax: torch.Tensor, rule: Rule, tile: int, bits: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes like `blocks` and E4M3 scales, one a block."""
    product = rule.code * rule.scale
    amax = amax[..., None, None]
    scale = torch.where(amax * (FLOAT_MAX / product) > 1, torch.full_like(amax, product) / amax, 0)  # 0 where the quotient would overflow: everything becomes 0
    largest = blocks.abs().amax(-1)
    to_scale = to_e4m3 if bits is None else to_e4m3_up

    def candidate(factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        scales = to_scale(divided(largest, rule.code) * scale * factor)
        inverse = (1 / (scales.to(torch.float32) * (1 / scale))).clamp(max=FLOAT_MAX)
        scaled = torch.where((scales.to(torch.float32) == 0).unsqueeze(-1) | (scale == 0).unsqueeze(-1), 0, blocks * inverse.unsqueeze(-1))
        return scales, scaled

    scales, scaled = candidate(1.0)
    if rule.error is not None:
        scales_4, scaled_4 = candidate(1.5)
        four = _error(blocks, scales_4, scaled_4, amax, product, rule.error, tile) < _error(blocks, scales, scaled, amax, product, rule.error, tile)
        scales = torch.where(four, scales_4.view(torch.uint8), scales.view(torch.uint8)).view(DTYPE)
        scaled = torch.where(four.unsqueeze(-1), scaled_4, scaled)
    return (fp4.encode(scaled) if bits is None else fp4.encode_stochastic(scaled, bits)), scales


def _error(
    blocks: torch.Tensor, scales: torch.Tensor, scaled: torch.Tensor, amax: torch.Tensor, product: float, measure: str, tile: int
) -> torch.Tensor:
    """How far a block is from what nearest rounding keeps of it, in the units of the data. Sums have a fixed order: along 16 values, then a tree over rows."""
    kept = divided(fp4.decode(fp4.encode(scaled)) * scales.to(torch.float32).unsqueeze(-1) * amax.unsqueeze(-1), product)
    apart = kept - blocks
    if measure == "abs_max":
        return apart.abs().amax(-1)
    terms = (apart * apart if measure == "mse" else apart.abs()).unflatten(-1, (tile, GROUP))
    sums = terms[..., 0]
    for i in range(1, GROUP):
        sums = sums + terms[..., i]
    for _ in range(int(math.log2(tile))):
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]
