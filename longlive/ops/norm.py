"""Normalisation over the feature dimension: statistics in at least float32, result in the dtype of the input.

Legend: D features, last dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .inference import fuses


def layer_norm(x: torch.Tensor, eps: float, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps), with optional weight [D] and bias [D]."""
    if weight is not None:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight [D]; square, mean and product in at least float32."""
    if x.ndim == 3 and x.shape[-1] % 2 == 0 and fuses(x, weight):
        from .triton_heads import norm_heads

        return norm_heads(x, weight, eps, x.shape[-1], None).flatten(2)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)
