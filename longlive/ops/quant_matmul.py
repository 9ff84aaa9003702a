"""Reference products of quantised matrices: the numbers that a tensor core returns, up to the order in which it adds.

Operands enter as code * scale, which is exact, and everything that belongs to a whole matrix (alpha) multiplies the finished sum in float32; the bias comes
after it (spec nvfp4 §1.5). Sums run in `wide`: float32 as in hardware, float64 to judge the order of addition away.

Legend: M rows of activations, N output features, K values summed over; [..., M, K] x [N, K] -> [..., M, N].
"""

from __future__ import annotations

import torch

from ..core.errors import InputError
from .fp8 import RowFP8, quantise_rows
from .nvfp4 import NVFP4


def w4a4(a: NVFP4, w: NVFP4, bias: torch.Tensor | None = None, *, dtype: torch.dtype | None = None, wide: torch.dtype = torch.float32) -> torch.Tensor:
    """NVFP4 activations times NVFP4 weights: alpha * sum (code scale)(code scale) + bias, alpha = the product of both decode scales."""
    _fits(a.shape, w.shape)
    alpha = (a.decode_scale * w.decode_scale)[..., None, None]
    return _finish(_sum(a.products(), w.products(), wide) * alpha.to(wide), bias, dtype or a.dtype)


def w4a16(x: torch.Tensor, w: NVFP4, bias: torch.Tensor | None = None, *, dtype: torch.dtype | None = None, wide: torch.dtype = torch.float32) -> torch.Tensor:
    """Activations as they are times weights dequantised to the type of the activations."""
    _fits(x.shape, w.shape)
    return _finish(_sum(x, w.dequantise(x.dtype), wide), bias, dtype or x.dtype)


def repack_fp8(w: NVFP4) -> RowFP8:
    """NVFP4 weights [N, K] as row-wise FP8, from their float32 values: how W4A8 stores for computing."""
    return quantise_rows(w.dequantise(torch.float32))


def w4a8(x: torch.Tensor, w: NVFP4, bias: torch.Tensor | None = None, *, dtype: torch.dtype | None = None, wide: torch.dtype = torch.float32) -> torch.Tensor:
    """FP8 activations (one scale a row) times NVFP4 weights repacked as FP8."""
    return w8a8(quantise_rows(x), repack_fp8(w), bias, dtype=dtype or x.dtype, wide=wide)


def w8a8(a: RowFP8, w: RowFP8, bias: torch.Tensor | None = None, *, dtype: torch.dtype | None = None, wide: torch.dtype = torch.float32) -> torch.Tensor:
    """FP8 x FP8: the sum of products of codes, times both scales, plus bias."""
    _fits(a.shape, w.shape)
    return _finish(_sum(a.e4m3, w.e4m3, wide) * a.scales.to(wide) * w.scales.to(wide).T, bias, dtype or a.dtype)


def _fits(a: tuple[int, ...], w: tuple[int, ...]) -> None:
    if len(w) != 2 or a[-1] != w[-1]:
        raise InputError(f"activations {list(a)} and weights {list(w)} do not multiply: weights are [N, K] with the same K")


def _sum(a: torch.Tensor, w: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """a w^T in `wide`, also where autocast would narrow it."""
    with torch.autocast(a.device.type, enabled=False):
        return a.to(wide) @ w.to(wide).T


def _finish(total: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return (total if bias is None else total + bias.to(total.dtype)).to(dtype)
