"""Reference products of quantised matrices: the numbers that a tensor core returns, up to the order in which it adds.

Operands enter as code * scale, which is exact, and everything that belongs to a whole matrix (alpha) multiplies the finished sum in float32; the bias comes
after it (spec nvfp4 §1.5). Sums run in `wide`: float32 as in hardware, float64 to judge the order of addition away.

Legend: M rows of activations, N output features, K values summed over; [..., M, K] x [N, K] -> [..., M, N].
"""

from __future__ import annotations

import torch

from ..core.errors import InputError
from .fp8 import RowFP8, quantise_rows, to_e4m3
from .nvfp4 import NVFP4
from .packed import finite_or_refuse

EXPONENT = 0x7F800000  # of a float32


def w4a4(a: NVFP4, w: NVFP4, bias: torch.Tensor | None = None, *, dtype: torch.dtype | None = None, wide: torch.dtype = torch.float32) -> torch.Tensor:
    """NVFP4 activations times NVFP4 weights: alpha * sum (code scale)(code scale) + bias, alpha = the product of both decode scales."""
    _fits(a.shape, w.shape)
    alpha = (a.decode_scale * w.decode_scale)[..., None, None]
    return _finish(_sum(a.products(), w.products(), wide) * alpha.to(wide), bias, dtype or a.dtype)


def w4a16(x: torch.Tensor, w: NVFP4, bias: torch.Tensor | None = None, *, dtype: torch.dtype | None = None, wide: torch.dtype = torch.float32) -> torch.Tensor:
    """Activations as they are times weights dequantised to the type of the activations."""
    _fits(x.shape, w.shape)
    return _finish(_sum(x, w.dequantise(x.dtype), wide), bias, dtype or x.dtype)


def fp8_row_scales(w: NVFP4) -> torch.Tensor:
    """float32 [N, 1]: the row scales under which NVFP4 weights [N, K] become FP8, the decode scale times a power of two.

    code * scale has up to 6 significant bits and E4M3 holds 4. Under a power of two they stay those bits, so that all but the products with 1.5, 3 and 6
    are kept exactly, and those lose two bits at most. The largest of a row comes to lie in [128, 256). Raises InputError for infinity or NaN.
    """
    largest = w.products().abs().amax(-1, keepdim=True)
    finite_or_refuse(largest, "raise")
    power = (largest.view(torch.int32) & EXPONENT).view(torch.float32)  # the power of two at or below it
    scales = torch.where(largest == 0, 1.0, power / 128) * w.decode_scale
    return scales.clamp(min=torch.finfo(torch.float32).tiny)


def as_fp8(w: NVFP4, scales: torch.Tensor) -> RowFP8:
    """NVFP4 weights [N, K] as FP8 with the row scales [N, 1]: E4M3((code * scale) * (decode scale / row scale)), each operation rounded in float32."""
    return RowFP8(to_e4m3(w.products() * (w.decode_scale / scales)).view(torch.uint8), scales, w.dtype)


def repack_fp8(w: NVFP4) -> RowFP8:
    """NVFP4 weights [N, K] as row-wise FP8: what W4A8 computes with."""
    return as_fp8(w, fp8_row_scales(w))


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
