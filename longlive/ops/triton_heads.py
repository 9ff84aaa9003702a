"""One pass over a token's heads: RMS norm over all of them, rotation of every pair, and the way to where they are read. (`heads` and
`coded_attention` are the references.)

A program is a token of q, of k or of v. Norm and rotation are float32 with one rounding at the end, which saturates where it is to E4M3.

Legend: B batch, N tokens, D = H * d features, H heads, d head features, d2 = d / 2 pairs, P pages (slots),
M = P N keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_attention import key_order
from .triton_rows import load_row, row_tiles, store_tile, sum_row


@triton.jit
def _token(x, weight, cos, sin, table, out, eps, FEATURES: tl.constexpr, PAIRS: tl.constexpr, TILE: tl.constexpr, ROTATE: tl.constexpr):
    """Normalises (and rotates, by the row of the tables at `table`) the token whose features begin at `x`, and stores them at `out`."""
    given, factors, squares = load_row(x, FEATURES, TILE), load_row(weight, FEATURES, TILE), ()
    for i in tl.static_range(len(given)):
        squares = squares + (given[i].to(tl.float32) * given[i].to(tl.float32),)
    rate = tl.rsqrt(sum_row(squares) / FEATURES + eps)
    for i in tl.static_range(len(given)):
        v = given[i].to(tl.float32) * rate * factors[i].to(tl.float32)
        if ROTATE:
            if i == 0 or (TILE // 2) % PAIRS:  # whole heads: the same angles in every tile
                place = table + (i * (TILE // 2) + tl.arange(0, TILE // 2)) % PAIRS
                c, s = tl.load(cos + place), tl.load(sin + place)
            a, b = tl.split(tl.reshape(v, [TILE // 2, 2]))
            v = tl.reshape(tl.join(a * c - b * s, a * s + b * c), [TILE])
        store_tile(out, v.to(out.dtype.element_ty), i, FEATURES, TILE)


@triton.jit
def fused_norm_heads(
    x, weight, cos, sin, out, tokens, stride_b, stride_n, table_b, eps,
    FEATURES: tl.constexpr, PAIRS: tl.constexpr, TILE: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, n = row // tokens, row % tokens
    _token(x + b * stride_b + n * stride_n, weight, cos, sin, b * table_b + n * PAIRS, out + row * FEATURES, eps, FEATURES, PAIRS, TILE, ROTATE)


@triton.jit
def fused_norm_rope_write(
    q, k, v, weight_q, weight_k, cos, sin, slot_B, q_out, k_pages, v_pages, tokens, pages, table_b, eps,
    q_b, q_n, k_b, k_n, v_b, v_n,
    FEATURES: tl.constexpr, PAIRS: tl.constexpr, TILE: tl.constexpr, ROTATE_K: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, n = row // tokens, row % tokens
    table = b * table_b + n * PAIRS
    which = tl.program_id(1)
    page = ((b * pages + tl.load(slot_B + b)) * tokens + n) * FEATURES
    if which == 0:
        _token(k + b * k_b + n * k_n, weight_k, cos, sin, table, k_pages + page, eps, FEATURES, PAIRS, TILE, ROTATE_K)
    elif QUERIES and which == 1:
        _token(q + b * q_b + n * q_n, weight_q, cos, sin, table, q_out + row * FEATURES, eps, FEATURES, PAIRS, TILE, True)
    else:
        tiles = load_row(v + b * v_b + n * v_n, FEATURES, TILE)
        for i in tl.static_range(len(tiles)):
            store_tile(v_pages + page, tiles[i].to(v_pages.dtype.element_ty), i, FEATURES, TILE)


@triton.jit
def fused_value_codes(v, slot_B, out, tokens, keys, H, v_b, v_n, d: tl.constexpr, TOKENS: tl.constexpr):
    """A block of tokens of a head of v into its slot of E4M3 [B, H, d, M], each 16 in the order of `key_order`."""
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place, c = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, d)
    n = key_order(place).to(tl.int64)
    x = tl.load(v + b * v_b + n[:, None] * v_n + head * d + c[None, :], mask=(n < tokens)[:, None], other=0.0).to(tl.float32)
    column = tl.load(slot_B + b) * tokens + place
    tl.store(out + ((b * H + head) * d + c)[:, None] * keys + column[None, :], x.to(out.dtype.element_ty).T, mask=(place < tokens)[None, :])


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
    q = None if q_BND is None else q_BND.new_empty(*k_pages.shape[:1], *k_pages.shape[2:])
    _write((q_BND, k_BND, v_BND), weights, eps, tables, slot_B, (q, k_pages, v_pages), rotate_k=rotate_k)
    return q


def norm_rope_code(
    q_BND: torch.Tensor | None,
    k_BND: torch.Tensor,
    v_BND: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    tables: tuple[torch.Tensor, torch.Tensor],
    slot_B: torch.Tensor,
    pages: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor | None:
    """The same into e4m3 pages of rotated keys [B, P, N, H, d] and of values [B, H, d, M]."""
    k_pages, v_pages = pages
    B, P, N, H, d = k_pages.shape
    q = None if q_BND is None else q_BND.new_empty(B, N, H, d)
    _write((q_BND, k_BND, None), weights, eps, tables, slot_B, (q, k_pages, None), rotate_k=True)
    write_values(v_BND, slot_B, v_pages)
    return q


def write_values(v_BND: torch.Tensor, slot_B: torch.Tensor, v_BHdM: torch.Tensor) -> None:
    """e4m3 of v [B, N, D], each 16 keys in the order of `triton_attention.key_order`, into slot `slot_B[b]` of [B, H, d, M]."""
    v = v_BND if v_BND.stride(-1) == 1 else v_BND.contiguous()
    B, H, d, M = v_BHdM.shape
    fused_value_codes[(triton.cdiv(v.shape[1], 64), H, B)](v, slot_B, v_BHdM, v.shape[1], M, H, v.stride(0), v.stride(1), d=d, TOKENS=64, num_warps=4)


def _write(given, weights, eps: float, tables, slot_B: torch.Tensor, places, *, rotate_k: bool) -> None:
    """q, k and v of `given` to their `places`: q [B, N, H, d], slots of k and v [B, P, N, H, d]. q and v may be None."""
    q, k, v = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in given)
    B, P, N, H, d = places[1].shape
    strides = [stride for t in (q, k, v) for stride in (k if t is None else t).stride()[:2]]
    cos, sin = (t.contiguous() for t in tables)
    q_out, k_pages, v_pages = (places[1] if t is None else t for t in places)
    fused_norm_rope_write[(B * N, 1 + (q is not None) + (v is not None))](
        k if q is None else q, k, k if v is None else v, weights[0].contiguous(), weights[1].contiguous(), cos, sin, slot_B, q_out, k_pages, v_pages,
        N, P, N * d // 2 if cos.shape[0] > 1 else 0, eps, *strides, ROTATE_K=rotate_k, QUERIES=q is not None, **_sizes(H * d, d),
    )  # fmt: skip


def _sizes(features: int, head_dim: int) -> dict[str, int]:
    return {"FEATURES": features, "PAIRS": head_dim // 2, **row_tiles(features)}
