"""MXFP4: E2M1 codes in groups of 32 along a row, one power of two (E8M0) a group, nothing for the whole tensor (spec nvfp4 §1.7).

Rules: `static_6` and `static_4` take the smallest power of two that maps the largest value to at most 6 (4); `ocp` takes 2^(floor(log2 max) - 2), under
which values above 6 saturate.

Legend: R rows, K values of a row, g = K / 32 rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..core.errors import CheckpointError, ConfigError
from . import fp4
from .packed import PackedTensor, check_part, divided, dtype_named, finite_or_refuse
from .scale_layout import round_up

GROUP = 32
BIAS, NAN_SCALE = 127, 255
RULES = ("static_6", "static_4", "ocp")


def power(codes: torch.Tensor) -> torch.Tensor:
    """float32 2^(code - 127) of E8M0 codes; 255 is NaN."""
    return torch.where(codes == NAN_SCALE, torch.nan, torch.ldexp(torch.ones(codes.shape, device=codes.device), codes.to(torch.int32) - BIAS))


@dataclass(frozen=True, eq=False)
class MXFP4(PackedTensor):
    """Values code * 2^(scale - 127): `codes` uint8 [..., R, 16 g], two codes a byte; `scales` uint8 [..., R, g]; stands for `shape` in `dtype`."""

    codes: torch.Tensor
    scales: torch.Tensor
    rule: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    name = "mxfp4"
    parts = ("codes", "scales")

    def describe(self) -> dict[str, Any]:
        return {"format": self.name, "rule": self.rule, "shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def build(cls, parts: dict[str, torch.Tensor], description: dict[str, Any]) -> MXFP4:
        shape, rule = tuple(description["shape"]), description["rule"]
        if rule not in RULES:
            raise CheckpointError(f"an mxfp4 tensor of rule {rule!r} is unknown; known are {', '.join(RULES)}")
        groups = round_up(shape[-1], GROUP) // GROUP
        check_part("codes", parts["codes"], torch.uint8, (*shape[:-1], groups * GROUP // 2))
        check_part("scales", parts["scales"], torch.uint8, (*shape[:-1], groups))
        return cls(parts["codes"], parts["scales"], rule, shape, dtype_named(description["dtype"]))

    def dequantise(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Exact in float32 unless it falls below 2^-149, then rounded to `dtype` (default: the tensor's own)."""
        codes = fp4.decode(fp4.unpack(self.codes)).unflatten(-1, (-1, GROUP))
        return (codes * power(self.scales).unsqueeze(-1)).flatten(-2)[..., : self.shape[-1]].to(dtype or self.dtype)


def quantise(x: torch.Tensor, rule: str = "static_6", *, bits: torch.Tensor | None = None, on_nonfinite: str = "raise") -> MXFP4:
    """`x` [..., R, K] in MXFP4. `bits`: as `nvfp4.quantise`; unbiased under the static rules, refused under `ocp`, which saturates.

    A group of zeros has the smallest scale and codes 0. Infinity or NaN: InputError, or with on_nonfinite "nan" NaN scales in the groups that hold one.
    Raises ConfigError for another rule (four over six has no meaning for powers of two).
    """
    if rule not in RULES:
        raise ConfigError(f"MXFP4 has no scale rule {rule!r}; use one of {', '.join(RULES)}")
    if bits is not None and rule == "ocp":
        raise ConfigError("stochastic rounding under the MXFP4 rule ocp is biased, because it saturates; use static_6")
    filled = F.pad(x.to(torch.float32), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    largest = filled.abs().amax(-1)
    finite_or_refuse(largest, on_nonfinite)
    broken = ~largest.isfinite()
    exponent = _exponent(torch.where(broken, 0, largest), rule)
    scales = torch.where(broken, NAN_SCALE, exponent + BIAS).to(torch.uint8)
    # Two exact steps: one power of two could leave float32 where the quotient does not.
    half = torch.div(exponent, 2, rounding_mode="floor")
    blocks = torch.where(broken.unsqueeze(-1), 0, filled)
    scaled = torch.ldexp(torch.ldexp(blocks, -half.unsqueeze(-1)), (half - exponent).unsqueeze(-1))
    if bits is None:
        codes = fp4.encode(scaled)
    else:
        codes = fp4.encode_stochastic(scaled, F.pad(bits, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP)))
    return MXFP4(fp4.pack(codes.flatten(-2)), scales, rule, tuple(x.shape), x.dtype)


def _exponent(largest: torch.Tensor, rule: str) -> torch.Tensor:
    """int32 exponents of the scales, within E8M0's -127..127."""
    if rule == "ocp":
        exponent = torch.frexp(largest).exponent - 3  # frexp's mantissa lies in [1/2, 1): floor(log2) is its exponent less one
    else:
        mantissa, exponent = torch.frexp(divided(largest, 6.0 if rule == "static_6" else 4.0))
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(largest == 0, -BIAS, exponent.clamp(-BIAS, BIAS))
