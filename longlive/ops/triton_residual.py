"""One pass over a token's features: add a gated branch, normalise the sum, modulate it. (`residual` says when, and is the reference.)

A program is a token. Sums and statistics are float32; the stored sum is what is normalised, as in the reference.

Legend: N tokens of a sample, S tokens of a group, D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .fp8 import RowFP8
from .triton_rows import store_row


@triton.jit
def fused_residual_norm(
    x, y, out, normed, gate, scale, shift, tokens, group, gate_b, gate_g, mod_b, mod_g, eps,
    row_scales, D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, MODULATE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample, level = row // tokens, (row % tokens) // group
    col = tl.arange(0, BLOCK)
    inside = col < D
    v = tl.load(x + row * D + col, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        branch = tl.load(y + row * D + col, mask=inside, other=0.0).to(tl.float32)
        if GATE:
            branch *= tl.load(gate + sample * gate_b + level * gate_g + col, mask=inside, other=0.0).to(tl.float32)
        total = (v + branch).to(out.dtype.element_ty)
        tl.store(out + row * D + col, total, mask=inside)
        v = total.to(tl.float32)
    if NORM:
        mean = tl.sum(v, 0) / D
        centred = tl.where(inside, v - mean, 0.0)
        h = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
        at = sample * mod_b + level * mod_g + col
        factor = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
        if MODULATE:
            factor += 1.0
        h = h * factor + tl.load(shift + at, mask=inside, other=0.0).to(tl.float32)
        if ROWS:
            h = tl.where(inside, h, 0.0).to(out.dtype.element_ty).to(tl.float32)
            store_row(h, inside, normed, row_scales, row, col, D)
        else:
            tl.store(normed + row * D + col, h.to(normed.dtype.element_ty), mask=inside)


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
    """(x + gate * y, its layer norm times scale plus shift; with `rows` that is rounded to the dtype of x and then made FP8 rows).

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
        row_scales, D=D, BLOCK=triton.next_power_of_2(D), ADD=y_BND is not None, GATE=gate is not None, NORM=normed is not None, MODULATE=modulated, ROWS=rows,
        num_warps=8 if D > 1024 else 4,
    )  # fmt: skip
    return out, RowFP8(normed, row_scales, x.dtype) if rows else normed


def _rows(t_BGD: torch.Tensor | None) -> tuple[torch.Tensor | None, tuple[int, int]]:
    """The tensor with contiguous features, and the strides of sample and group (0 where one row serves all samples)."""
    if t_BGD is None:
        return None, (0, 0)
    if t_BGD.stride(-1) != 1:
        t_BGD = t_BGD.contiguous()
    return t_BGD, (t_BGD.stride(0) if t_BGD.shape[0] > 1 else 0, t_BGD.stride(1))
