"""Rotary positions in three axes: a token's time, row and column each turn their own share of the head's feature pairs.

Positions are data. Angles are computed in float64 from the positions that travel with the tokens, never looked up in a table, so
that a film has no longest length, and a position may be fractional. (Spec inference §1.4.)

Legend: B batch (1 broadcasts), F latent frames, N = F * height * width tokens, H heads, d head features, d2 = d / 2 feature pairs.
"""

from __future__ import annotations

import torch

from ..core.tokens import Tokens

THETA = 10000.0


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Feature pairs that (time, row, column) turn: 22, 21, 21 of a head of 128 features."""
    side = head_dim // 6
    return head_dim // 2 - 2 * side, side, side


def axis_angles(position: torch.Tensor, pairs: int) -> torch.Tensor:
    """Angles of one axis, float64 [..., pairs]: position * THETA^(-j / pairs)."""
    j = torch.arange(pairs, dtype=torch.float64, device=position.device)
    return position.to(torch.float64).unsqueeze(-1) * THETA ** (-j / pairs)


def rope_tables(tokens: Tokens, head_dim: int, *, t_scale: float = 1.0, position_BF: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [B, N, d2], float32 rounded from float64, for every token of `tokens`.

    `position_BF` replaces the tokens' temporal positions (any number of frames); both are multiplied by `t_scale`.
    """
    position = tokens.position_BF if position_BF is None else position_BF
    h, w = tokens.height, tokens.width
    time, row, column = axis_pairs(head_dim)
    device = position.device
    axes = (
        axis_angles(position * t_scale, time)[:, :, None, None],
        axis_angles(torch.arange(h, device=device), row)[None, None, :, None],
        axis_angles(torch.arange(w, device=device), column)[None, None, None, :],
    )
    shape = (*position.shape, h, w)

    def join(function) -> torch.Tensor:
        parts = [function(a).to(torch.float32).expand(*shape, a.shape[-1]) for a in axes]
        return torch.cat(parts, dim=-1).flatten(1, 3)

    return join(torch.cos), join(torch.sin)


def apply_rope(x_BNHd: torch.Tensor, cos_BNd2: torch.Tensor, sin_BNd2: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (2j, 2j + 1) of every head; at least float32 inside, the dtype of `x_BNHd` outside."""
    wide = torch.promote_types(x_BNHd.dtype, torch.float32)
    a, b = x_BNHd.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_BNd2.to(wide).unsqueeze(2), sin_BNd2.to(wide).unsqueeze(2)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x_BNHd.dtype)
