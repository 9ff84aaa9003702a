"""Attention to a prompt: many queries, few keys, a bias per key, and a row of keys and values per group of queries. (`text_attention` is the reference.)

A program takes a block of queries of one head. It weighs all keys at once, a block and a smaller one, the rest; or, of a long prompt, a block after the other
with a running softmax in float32, as far as there are keys with a bias. Programs are small, so that several share a multiprocessor: each waits for memory
most of its time. A few kernels serve prompts of all lengths, since each is compiled when it is met first.

Legend: G groups of N queries, R rows (prompts) of M keys, H heads, d head features.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

QUERIES, KEYS, RESTS, LONGEST = 64, 128, (16, 64), 512


@triton.jit
def _logits(queries, keys, bias, first, M, scale, KEYS: tl.constexpr):
    """In units of log 2: [QUERIES, KEYS] of the keys from `first` on; -inf where there are none."""
    m = first + tl.arange(0, KEYS)
    added = tl.load(bias + m, mask=m < M, other=float("-inf")) * 1.4426950408889634
    return tl.dot(queries, keys.T) * scale + added[None, :]


@triton.jit
def fused_text_attention(
    q_rows, k_rows, v_rows, k_rest, v_rest, bias, rows, out_rows, M, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, REST: tl.constexpr, LONG: tl.constexpr, WIDTH: tl.constexpr, d: tl.constexpr,
):  # fmt: skip
    n, head, group = tl.program_id(0) * QUERIES, tl.program_id(1), tl.program_id(2)
    queries = q_rows.load([group, n, head * d]).reshape([QUERIES, d])
    row = tl.load(rows + group).to(tl.int32)
    bias += row * M
    logits = _logits(queries, k_rows.load([row, 0, head * d]).reshape([KEYS, d]), bias, 0, M, scale, KEYS)
    highest = tl.max(logits, 1)
    if REST > 0:
        rest = _logits(queries, k_rest.load([row, KEYS, head * d]).reshape([REST, d]), bias, KEYS, M, scale, REST)
        highest = tl.maximum(highest, tl.max(rest, 1))
    highest = tl.maximum(highest, -1e30)  # of a block without a bias
    p = tl.exp2(logits - highest[:, None])
    weight = tl.sum(p, 1)
    read = tl.dot(p.to(queries.dtype), v_rows.load([row, 0, head * d]).reshape([KEYS, d]))
    if REST > 0:
        r = tl.exp2(rest - highest[:, None])
        weight += tl.sum(r, 1)
        read = tl.dot(r.to(queries.dtype), v_rest.load([row, KEYS, head * d]).reshape([REST, d]), read)
    if LONG:
        key = tl.arange(0, WIDTH)
        heard = tl.load(bias + key, mask=key < M, other=float("-inf")) > float("-inf")
        for start in range(KEYS, tl.max(tl.where(heard, key + 1, 0), 0), KEYS):
            logits = _logits(queries, k_rows.load([row, start, head * d]).reshape([KEYS, d]), bias, start, M, scale, KEYS)
            now = tl.maximum(highest, tl.max(logits, 1))
            faded = tl.exp2(highest - now)
            p = tl.exp2(logits - now[:, None])
            weight = weight * faded + tl.sum(p, 1)
            values = v_rows.load([row, start, head * d]).reshape([KEYS, d])
            read = tl.dot(p.to(queries.dtype), values, read * faded[:, None])
            highest = now
    out_rows.store([group, n, head * d], (read * (1.0 / weight)[:, None]).to(queries.dtype).reshape([1, QUERIES, d]))


def text_attention(q_GNHd: torch.Tensor, k_RMHd: torch.Tensor, v_RMHd: torch.Tensor, bias_RM: torch.Tensor, rows_G: torch.Tensor) -> torch.Tensor:
    """[G, N, H, d]: what each group reads from the row of keys and values that `rows_G` names. At least one bias of every row is finite.

    In half precision; d is a power of two from 16 to 256.
    """
    q, k, v = (t.contiguous() for t in (q_GNHd, k_RMHd, v_RMHd))
    G, N, H, d = q.shape
    M, out = k.shape[1], torch.empty_like(q)
    long = M > KEYS + RESTS[-1]
    rest = 0 if M <= KEYS or long else next(size for size in RESTS if M <= KEYS + size)
    sizes = ((q, QUERIES), (k, KEYS), (v, KEYS), (k, rest or KEYS), (v, rest or KEYS), (out, QUERIES))
    *given, out_rows = (TensorDescriptor.from_tensor(t.flatten(2), [1, size, d]) for t, size in sizes)
    fused_text_attention[(triton.cdiv(N, QUERIES), H, G)](
        *given, bias_RM.float().contiguous(), rows_G, out_rows, M, d**-0.5 * math.log2(math.e),
        QUERIES=QUERIES, KEYS=KEYS, REST=rest, LONG=long, WIDTH=max(LONGEST, triton.next_power_of_2(M)), d=d, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out
