"""E4M3, the 8-bit float (largest 448, smallest normal 2^-6, smallest 2^-9), and tensors of it with one scale a row.

Casts saturate: torch versions differ in what they make of a number beyond 448, so that it is clamped first. NaN stays NaN (spec nvfp4 §1.3, §1.5).

Legend: R rows, K values of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .packed import PackedTensor, check_part, divided, dtype_named, finite_or_refuse

LARGEST = 448.0
DTYPE = torch.float8_e4m3fn


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Nearest E4M3, ties to even, saturating at 448."""
    return x.to(torch.float32).clamp(-LARGEST, LARGEST).to(DTYPE)


def to_e4m3_up(x: torch.Tensor) -> torch.Tensor:
    """The smallest E4M3 that is at least `x`, for x >= 0; saturating at 448."""
    wide = x.to(torch.float32).clamp(max=LARGEST)
    near = wide.to(DTYPE)
    return (near.view(torch.uint8) + (near.to(torch.float32) < wide).to(torch.uint8)).view(DTYPE)


@dataclass(frozen=True, eq=False)
class RowFP8(PackedTensor):
    """Values codes * scale: `codes` uint8 [..., R, K] (E4M3 bits), `scales` float32 [..., R, 1]; stands for `shape` in `dtype`."""

    codes: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    name = "fp8"
    parts = ("codes", "scales")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def e4m3(self) -> torch.Tensor:
        """The codes as float8_e4m3fn, without a copy."""
        return self.codes.view(DTYPE)

    def describe(self) -> dict[str, Any]:
        return {"format": self.name, "dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape)}

    @classmethod
    def build(cls, parts: dict[str, torch.Tensor], description: dict[str, Any]) -> RowFP8:
        shape = tuple(description["shape"])
        check_part("codes", parts["codes"], torch.uint8, shape)
        check_part("scales", parts["scales"], torch.float32, (*shape[:-1], 1))
        return cls(parts["codes"], parts["scales"], dtype_named(description["dtype"]))

    def dequantise(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """float32(code * scale), rounded once more to `dtype` (default: the tensor's own)."""
        return (self.e4m3.to(torch.float32) * self.scales).to(dtype or self.dtype)


def quantise_rows(x: torch.Tensor, *, on_nonfinite: str = "raise") -> RowFP8:
    """`x` [..., R, K] with scale = max|row| / 448; a row of zeros has scale 1. Spec inference §10.3.

    Infinity or NaN: InputError, or with on_nonfinite "nan" a row of NaN (no synchronisation with a GPU).
    """
    wide = x.to(torch.float32)
    amax = wide.abs().amax(-1, keepdim=True)
    finite_or_refuse(amax, on_nonfinite)
    smallest = torch.finfo(torch.float32).tiny
    scales = torch.where(amax == 0, 1.0, divided(amax, LARGEST).clamp(min=smallest))
    broken = ~amax.isfinite()
    codes = to_e4m3(wide / scales).view(torch.uint8)
    return RowFP8(torch.where(broken, 0, codes), torch.where(broken, torch.nan, scales), x.dtype)

