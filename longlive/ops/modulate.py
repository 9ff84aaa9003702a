"""Adaptive modulation: shift, scale and gate that depend on the noise level, one row per group of consecutive tokens.

A group is a latent frame as a rule: its tokens share one noise level, so that the rows stay G x D and are never spread to N x D.

Legend: B batch, G groups, N = G * S tokens, D features.
"""

from __future__ import annotations

import torch


def modulate(x_BND: torch.Tensor, shift_BGD: torch.Tensor, scale_BGD: torch.Tensor) -> torch.Tensor:
    """x * (1 + scale) + shift, each row of shift and scale for its N / G consecutive tokens."""
    x = x_BND.unflatten(1, (shift_BGD.shape[1], -1))
    return (x * (1 + scale_BGD.unsqueeze(2)) + shift_BGD.unsqueeze(2)).flatten(1, 2)


def gated_add(x_BND: torch.Tensor, y_BND: torch.Tensor, gate_BGD: torch.Tensor) -> torch.Tensor:
    """x + gate * y: the residual of a modulated branch."""
    y = y_BND.unflatten(1, (gate_BGD.shape[1], -1))
    return x_BND + (y * gate_BGD.unsqueeze(2)).flatten(1, 2)
