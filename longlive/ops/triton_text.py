"""Attention to a prompt: many queries, few keys, a bias per key, and a row of keys and values per group of queries. (`text_attention` is the reference.)

A program takes a block of queries of one head through the keys up to the last that has a bias, with a running softmax in float32. Small blocks, so that
several programs share a multiprocessor: each waits for memory most of its time.

Legend: G groups of N queries, R rows (prompts) of M keys, H heads, d head features.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

QUERIES, KEYS = 64, 32


@triton.jit
def fused_text_attention(
    q_rows, k_rows, v_rows, bias, rows, out_rows, M, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, d: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, head, group = tl.program_id(0) * QUERIES, tl.program_id(1), tl.program_id(2)
    queries = q_rows.load([group, n, head * d]).reshape([QUERIES, d])
    row = tl.load(rows + group).to(tl.int32)
    key = tl.arange(0, WIDTH)
    heard = tl.load(bias + row * M + key, mask=key < M, other=float("-inf")) > float("-inf")
    highest = tl.full([QUERIES], -1e30, dtype=tl.float32)
    weight = tl.zeros([QUERIES], dtype=tl.float32)
    read = tl.zeros([QUERIES, d], dtype=tl.float32)
    for start in range(0, tl.max(tl.where(heard, key + 1, 0), 0), KEYS):
        m = start + tl.arange(0, KEYS)
        keys = k_rows.load([row, start, head * d]).reshape([KEYS, d])
        added = tl.load(bias + row * M + m, mask=m < M, other=float("-inf")) * 1.4426950408889634
        logits = tl.dot(queries, keys.T, input_precision=PRECISION) * scale + added[None, :]
        now = tl.maximum(highest, tl.max(logits, 1))
        faded = tl.exp2(highest - now)
        p = tl.exp2(logits - now[:, None])
        weight = weight * faded + tl.sum(p, 1)
        values = v_rows.load([row, start, head * d]).reshape([KEYS, d])
        read = tl.dot(p.to(values.dtype), values, read * faded[:, None], input_precision=PRECISION)
        highest = now
    out_rows.store([group, n, head * d], (read * (1.0 / weight)[:, None]).to(queries.dtype).reshape([1, QUERIES, d]))


def text_attention(q_GNHd: torch.Tensor, k_RMHd: torch.Tensor, v_RMHd: torch.Tensor, bias_RM: torch.Tensor, rows_G: torch.Tensor) -> torch.Tensor:
    """[G, N, H, d]: what each group reads from the row of keys and values that `rows_G` names. At least one bias of every row is finite.

    d is a power of two from 16 to 256.
    """
    q, k, v = (t.contiguous() for t in (q_GNHd, k_RMHd, v_RMHd))
    G, N, H, d = q.shape
    M, out, wide = k.shape[1], torch.empty_like(q), q.dtype == torch.float32
    sizes = ((q, QUERIES), (k, KEYS), (v, KEYS), (out, QUERIES))
    q_rows, k_rows, v_rows, out_rows = (TensorDescriptor.from_tensor(t.flatten(2), [1, size, d]) for t, size in sizes)
    fused_text_attention[(triton.cdiv(N, QUERIES), H, G)](
        q_rows, k_rows, v_rows, bias_RM.float().contiguous(), rows_G, out_rows, M, d**-0.5 * math.log2(math.e),
        QUERIES=QUERIES, KEYS=KEYS, d=d, WIDTH=triton.next_power_of_2(M), PRECISION="ieee" if wide else "tf32", num_warps=8 if wide else 4, num_stages=2,
    )  # fmt: skip
    return out
