"""Attention to a prompt: many queries, few keys, a bias per key, and a row of keys and values per group of queries. (`text_attention` is the reference.)

A program takes a block of queries of one head through all keys, with a running softmax in float32.

Legend: G groups of N queries, R rows (prompts) of M keys, H heads, d head features.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

QUERIES, KEYS = 128, 64


@triton.jit
def fused_text_attention(
    q, k, v, bias, rows, out, N, M, H, scale, d: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr
):
    head, group = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    c = tl.arange(0, BLOCK_D)
    place = ((group * N + n[:, None]) * H + head) * d + c[None, :]
    inside = (n < N)[:, None] & (c < d)[None, :]
    queries = tl.load(q + place, mask=inside, other=0.0)
    row = tl.load(rows + group)
    highest = tl.full([QUERIES], -1e30, dtype=tl.float32)
    weight = tl.zeros([QUERIES], dtype=tl.float32)
    read = tl.zeros([QUERIES, BLOCK_D], dtype=tl.float32)
    for start in range(0, M, KEYS):
        m = start + tl.arange(0, KEYS)
        at = ((row * M + m[:, None]) * H + head) * d + c[None, :]
        there = (m < M)[:, None] & (c < d)[None, :]
        keys = tl.load(k + at, mask=there, other=0.0)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        added = tl.load(bias + row * M + m, mask=m < M, other=float("-inf")) * 1.4426950408889634
        logits = logits + added[None, :]
        now = tl.maximum(highest, tl.max(logits, 1))
        faded = tl.exp2(highest - now)
        p = tl.exp2(logits - now[:, None])
        weight = weight * faded + tl.sum(p, 1)
        values = tl.load(v + at, mask=there, other=0.0)
        read = read * faded[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
        highest = now
    tl.store(out + place, (read / weight[:, None]).to(out.dtype.element_ty), mask=inside)


def text_attention(q_GNHd: torch.Tensor, k_RMHd: torch.Tensor, v_RMHd: torch.Tensor, bias_RM: torch.Tensor, rows_G: torch.Tensor) -> torch.Tensor:
    """[G, N, H, d]: what each group reads from the row of keys and values that `rows_G` names. At least one bias of every row is finite."""
    q, k, v = (t.contiguous() for t in (q_GNHd, k_RMHd, v_RMHd))
    G, N, H, d = q.shape
    out = torch.empty_like(q)
    wide = q.dtype == torch.float32
    queries, keys = (QUERIES // 2, KEYS // 2) if wide else (QUERIES, KEYS)
    fused_text_attention[(triton.cdiv(N, queries), H, G)](
        q, k, v, bias_RM.float().contiguous(), rows_G, out, N, k.shape[1], H, d**-0.5 * math.log2(math.e), d=d, BLOCK_D=max(16, triton.next_power_of_2(d)),
        QUERIES=queries, KEYS=keys, PRECISION="ieee" if wide else "tf32", num_warps=8, num_stages=2,
    )  # fmt: skip
    return out
