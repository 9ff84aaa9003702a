"""One pass over a token's features: add a gated branch, normalise the sum, modulate it. (`residual` says when, and is the reference.)

A program is a token. Sums and statistics are float32; the stored sum is what is normalised, as in the reference. FP8 rows are made of the norm in float32: one
rounding less than in the reference.

Legend: N tokens of a sample, S tokens of a group, D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .fp8 import RowFP8
from .triton_rows import load_row, row_tiles, store_rows, store_tile, sum_row


@triton.jit
def fused_residual_norm(
    x, y, out, normed, gate, scale, shift, tokens, group, gate_b, gate_g, mod_b, mod_g, eps,
    row_scales, D: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, MODULATE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample, level = row // tokens, (row % tokens) // group
    given, tiles = load_row(x + row * D, D, TILE), ()
    if ADD:
        branch = load_row(y + row * D, D, TILE)
        if GATE:
            gates = load_row(gate + sample * gate_b + level * gate_g, D, TILE)
    if NORM:  # loaded before the sums are waited for
        factors, terms = load_row(scale + sample * mod_b + level * mod_g, D, TILE), load_row(shift + sample * mod_b + level * mod_g, D, TILE)
    for i in tl.static_range(len(given)):
        v = given[i].to(tl.float32)
        if ADD:
            added = branch[i].to(tl.float32)
            if GATE:
                added *= gates[i].to(tl.float32)
            total = (v + added).to(out.dtype.element_ty)
            store_tile(out + row * D, total, i, D, TILE)
            v = total.to(tl.float32)
        tiles = tiles + (v,)
    if NORM:
        mean = sum_row(tiles) / D
        centred, squares = (), ()
        for i in tl.static_range(len(tiles)):
            c = tl.where(i * TILE + tl.arange(0, TILE) < D, tiles[i] - mean, 0.0)
            centred, squares = centred + (c,), squares + (c * c,)
        rate = tl.rsqrt(sum_row(squares) / D + eps)
        rows = ()
        for i in tl.static_range(len(centred)):
            factor = factors[i].to(tl.float32)
            if MODULATE:
                factor += 1.0
            h = centred[i] * rate * factor + terms[i].to(tl.float32)
            if ROWS:
                rows = rows + (h,)
            else:
                store_tile(normed + row * D, h.to(normed.dtype.element_ty), i, D, TILE)
        if ROWS:
            store_rows(rows, normed, row_scales, row, D, TILE, False)


def residual_norm(
    x_BND: torch.Tensor,
    y_BND: torch.Tensor | None,
    gate_BGD: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    *,
    modulated: bool,
    rows: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | RowFP8 | None]:
    """(x + gate * y, its layer norm times scale plus shift; with `rows` as FP8 rows).

    `modulated`: scale and shift are [B, G, D] and scale counts from 1; else they are [D]. Without `y_BND` the sum is x, without `scale` there is no norm.
    """
    x = x_BND.contiguous()
    B, N, D = x.shape
    out = x if y_BND is None else torch.empty_like(x)
    normed = None if scale is None else torch.empty_like(x, dtype=torch.uint8 if rows else None)
    row_scales = torch.empty(B, N, 1, dtype=torch.float32, device=x.device) if rows else x
    groups = next((t.shape[1] for t in (gate_BGD, scale if modulated else None) if t is not None), 1)
    gate, (gate_b, gate_g) = _rows(gate_BGD)
    if modulated:
        scale, (mod_b, mod_g) = _rows(scale)
        shift, other = _rows(shift)
        if other != (mod_b, mod_g):
            scale, shift = (t.expand(B, -1, -1).contiguous() for t in (scale, shift))
            mod_b, mod_g = scale.stride()[:2]
    else:
        mod_b = mod_g = 0
    fused_residual_norm[(B * N,)](
        x, x if y_BND is None else y_BND.contiguous(), out, out if normed is None else normed, x if gate is None else gate,
        x if scale is None else scale, x if shift is None else shift, N, N // groups, gate_b, gate_g, mod_b, mod_g, eps,
        row_scales, D=D, ADD=y_BND is not None, GATE=gate is not None, NORM=normed is not None, MODULATE=modulated, ROWS=rows,
        **row_tiles(D),
    )  # fmt: skip
    return out, RowFP8(normed, row_scales, x.dtype) if rows else normed


def _rows(t_BGD: torch.Tensor | None) -> tuple[torch.Tensor | None, tuple[int, int]]:
    """The tensor with contiguous features, and the strides of sample and group (0 where one row serves all samples)."""
    if t_BGD is None:
        return None, (0, 0)
    if t_BGD.stride(-1) != 1:
        t_BGD = t_BGD.contiguous()
    return t_BGD, (t_BGD.stride(0) if t_BGD.shape[0] > 1 else 0, t_BGD.stride(1))
