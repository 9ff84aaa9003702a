"""One pass over a token's heads: RMS norm over all of them, rotation of every pair, and the way to where they are read. (`heads` is the reference.)

A program is a token of q, of k or of v. Norm and rotation are float32 with one rounding at the end.

Legend: B batch, N tokens, D = H * d features, H heads, d head features, d2 = d / 2 pairs, P pages (slots).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _token(x, weight, cos, sin, table, out, eps, FEATURES: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, ROTATE: tl.constexpr):
    """Normalises (and rotates, by the row of the tables at `table`) the token whose features begin at `x`, and stores them at `out`."""
    col = tl.arange(0, BLOCK)
    v = tl.load(x + col, mask=col < FEATURES, other=0.0).to(tl.float32)
    v = v * tl.rsqrt(tl.sum(v * v, 0) / FEATURES + eps) * tl.load(weight + col, mask=col < FEATURES, other=0.0).to(tl.float32)
    if ROTATE:
        pair = tl.arange(0, BLOCK // 2)
        place, known = table + pair % PAIRS, pair < FEATURES // 2
        c, s = tl.load(cos + place, mask=known, other=0.0), tl.load(sin + place, mask=known, other=0.0)
        a, b = tl.split(tl.reshape(v, [BLOCK // 2, 2]))
        v = tl.reshape(tl.join(a * c - b * s, a * s + b * c), [BLOCK])
    tl.store(out + col, v.to(out.dtype.element_ty), mask=col < FEATURES)


@triton.jit
def fused_norm_heads(
    x, weight, cos, sin, out, tokens, stride_b, stride_n, table_b, eps,
    FEATURES: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, n = row // tokens, row % tokens
    _token(x + b * stride_b + n * stride_n, weight, cos, sin, b * table_b + n * PAIRS, out + row * FEATURES, eps, FEATURES, PAIRS, BLOCK, ROTATE)


@triton.jit
def fused_norm_rope_write(
    q, k, v, weight_q, weight_k, cos, sin, slot_B, q_out, k_pages, v_pages, tokens, pages, table_b, eps,
    q_b, q_n, k_b, k_n, v_b, v_n,
    FEATURES: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, ROTATE_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, n = row // tokens, row % tokens
    table = b * table_b + n * PAIRS
    which = tl.program_id(1)
    page = ((b * pages + tl.load(slot_B + b)) * tokens + n) * FEATURES
    if which == 0:
        _token(k + b * k_b + n * k_n, weight_k, cos, sin, table, k_pages + page, eps, FEATURES, PAIRS, BLOCK, ROTATE_K)
    elif which == 1:
        col = tl.arange(0, BLOCK)
        value = tl.load(v + b * v_b + n * v_n + col, mask=col < FEATURES, other=0.0)
        tl.store(v_pages + page + col, value.to(v_pages.dtype.element_ty), mask=col < FEATURES)
    else:
        _token(q + b * q_b + n * q_n, weight_q, cos, sin, table, q_out + row * FEATURES, eps, FEATURES, PAIRS, BLOCK, True)


def norm_heads(x_BND: torch.Tensor, weight: torch.Tensor, eps: float, head_dim: int, tables: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """RMS norm of x [B, N, D] (features contiguous), rotated where `tables` (float32 [B or 1, N, d2]) are given: [B, N, H, d]."""
    x = x_BND if x_BND.stride(-1) == 1 else x_BND.contiguous()
    B, N, D = x.shape
    out = torch.empty(B, N, D // head_dim, head_dim, dtype=x.dtype, device=x.device)
    cos, sin = (t.contiguous() for t in tables) if tables else (weight, weight)
    fused_norm_heads[(B * N,)](
        x, weight.contiguous(), cos, sin, out, N, x.stride(0), x.stride(1), N * head_dim // 2 if tables and cos.shape[0] > 1 else 0, eps,
        ROTATE=tables is not None, **_sizes(D, head_dim),
    )  # fmt: skip
    return out


def norm_rope_write(
    q_BND: torch.Tensor | None,
    k_BND: torch.Tensor,
    v_BND: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    tables: tuple[torch.Tensor, torch.Tensor],
    slot_B: torch.Tensor,
    pages: tuple[torch.Tensor, torch.Tensor],
    *,
    rotate_k: bool,
) -> torch.Tensor | None:
    """Rotated q [B, N, H, d] (None without q); normalised k (rotated with `rotate_k`) and v go to slot `slot_B[b]` of the contiguous pages [B, P, N, H, d]."""
    k_pages, v_pages = pages
    B, P, N, H, d = k_pages.shape
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k_BND, v_BND))
    q = k if q_BND is None else q_BND if q_BND.stride(-1) == 1 else q_BND.contiguous()
    out = k_pages if q_BND is None else torch.empty(B, N, H, d, dtype=q.dtype, device=q.device)
    cos, sin = (t.contiguous() for t in tables)
    fused_norm_rope_write[(B * N, 2 if q_BND is None else 3)](
        q, k, v, weights[0].contiguous(), weights[1].contiguous(), cos, sin, slot_B, out, k_pages, v_pages, N, P, N * d // 2 if cos.shape[0] > 1 else 0, eps,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], ROTATE_K=rotate_k, **_sizes(H * d, d),
    )  # fmt: skip
    return None if q_BND is None else out


def _sizes(features: int, head_dim: int) -> dict[str, int]:
    return {"FEATURES": features, "PAIRS": head_dim // 2, "BLOCK": triton.next_power_of_2(features), "num_warps": 8 if features > 1024 else 4}
