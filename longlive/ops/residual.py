"""The residual stream of a transformer block: add a branch, normalise for the next one, in one pass where a kernel can.

`readers` are the layers that read the norm; where they take a form of their own (`intake`), they get it in place of the tensor.

Legend: B batch, G groups of consecutive tokens that share a noise level, N = G * S tokens, D features.
"""

from __future__ import annotations

import torch
from torch import nn

from .inference import fuses
from .intake import prepared, wants_rows
from .modulate import gated_add, modulate
from .norm import layer_norm

Pair = tuple[torch.Tensor, torch.Tensor]
Readers = tuple[nn.Module, ...]


def norm_modulate(x_BND: torch.Tensor, shift_BGD: torch.Tensor, scale_BGD: torch.Tensor, eps: float, readers: Readers = ()) -> torch.Tensor:
    """layer_norm(x) * (1 + scale) + shift."""
    if fuses(x_BND, shift_BGD, scale_BGD):
        from .triton_residual import residual_norm

        return residual_norm(x_BND, None, None, scale_BGD, shift_BGD, eps, modulated=True, rows=wants_rows(x_BND, *readers))[1]
    return prepared(modulate(layer_norm(x_BND, eps), shift_BGD, scale_BGD), *readers)


def add_norm(
    x_BND: torch.Tensor, y_BND: torch.Tensor, gate_BGD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, readers: Readers = ()
) -> Pair:
    """(x + gate * y, its layer norm with weight [D] and bias [D])."""
    if fuses(x_BND, y_BND, gate_BGD, weight, bias):
        from .triton_residual import residual_norm

        return residual_norm(x_BND, y_BND, gate_BGD, weight, bias, eps, modulated=False, rows=wants_rows(x_BND, *readers))
    x_BND = gated_add(x_BND, y_BND, gate_BGD)
    return x_BND, prepared(layer_norm(x_BND, eps, weight, bias), *readers)


def add_norm_modulate(
    x_BND: torch.Tensor, y_BND: torch.Tensor, shift_BGD: torch.Tensor, scale_BGD: torch.Tensor, eps: float, readers: Readers = ()
) -> Pair:
    """(x + y, norm_modulate of it)."""
    if fuses(x_BND, y_BND, shift_BGD, scale_BGD):
        from .triton_residual import residual_norm

        return residual_norm(x_BND, y_BND, None, scale_BGD, shift_BGD, eps, modulated=True, rows=wants_rows(x_BND, *readers))
    x_BND = x_BND + y_BND
    return x_BND, prepared(modulate(layer_norm(x_BND, eps), shift_BGD, scale_BGD), *readers)


def add_gated(x_BND: torch.Tensor, y_BND: torch.Tensor, gate_BGD: torch.Tensor) -> torch.Tensor:
    """x + gate * y."""
    if fuses(x_BND, y_BND, gate_BGD):
        from .triton_residual import residual_norm

        return residual_norm(x_BND, y_BND, gate_BGD, None, None, 0.0, modulated=False)[0]
    return gated_add(x_BND, y_BND, gate_BGD)
