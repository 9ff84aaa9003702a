"""Attention whose two products run in FP8, with a running softmax in float32. (`attention.fp8` says when, and is the reference.)

Keys and values are cast to e4m3 first. Values come transposed, since the tensor cores read both operands of an FP8 product along the summed dimension, and
each 16 keys of theirs in an order in which a thread holds the weights of the first product as the second one reads them, so that no weight changes its place.

`fused_attention_fp8` computes on any GPU whose tiles are large enough; Hopper has its own, `hopper_attention`. A program takes a block of queries of one head
through all keys. Weights within a block are exp2(logit - highest + 8), so that e4m3 holds them down to 2^-17 of the largest.

Legend: B batch, N queries, M keys (a multiple of 16), H heads, d head features.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .triton_available import fused_roles
from .triton_rows import saturated

QUERIES, KEYS = 64, 128


@triton.jit(do_not_specialize=["N", "M", "H", "k_step"])
def fused_attention_fp8(
    q_rows, k_rows, v_rows, out, N, M, H, k_step, scale,
    d: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    head, b = tl.program_id(1), tl.program_id(2)
    n = tl.program_id(0) * BN
    q = q_rows.load([b * N + n, head * d])
    highest = tl.full([BN], -1e30, dtype=tl.float32)
    weight = tl.zeros([BN], dtype=tl.float32)
    read = tl.zeros([BN, d], dtype=tl.float32)
    for m in tl.range(0, M, BM):
        logits = tl.dot(q, k_rows.load([b * k_step + m, head * d]).T)
        if not WHOLE:
            logits = tl.where((m + tl.arange(0, BM) < M)[None, :], logits, float("-inf"))
        now = tl.maximum(highest, tl.max(logits, 1))
        p = tl.exp2(logits * scale - (now * scale - 8.0)[:, None])
        faded = tl.exp2((highest - now) * scale)
        weight = weight * faded + tl.sum(p, 1)
        read = read * faded[:, None]
        p = p.reshape([BN, BM // 16, 2, 4, 2]).permute(0, 1, 3, 2, 4).reshape([BN, BM])  # the order of `key_order`
        read = tl.dot(p.to(tl.float8e4nv), v_rows.load([(b * H + head) * d, m]).T, read)
        highest = now
    row = n + tl.arange(0, BN)
    place = ((b * N + row).to(tl.int64) * H + head)[:, None] * d + tl.arange(0, d)[None, :]
    tl.store(out + place, (read / weight[:, None]).to(out.dtype.element_ty), mask=(row < N)[:, None])


@triton.jit
def key_order(m):
    """The key of a sample that stands at place m of its transposed values: of each 16, key (h, c, e) at (c, h, e), h and e of 2, c of 4."""
    return (m & -16) + ((m >> 1) & 1) * 8 + ((m >> 2) & 3) * 2 + (m & 1)


@triton.jit
def fused_transpose_fp8(v, out, M, in_b, in_m, out_b, out_c, d: tl.constexpr, BM: tl.constexpr):
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, d)
    key = key_order(m).to(tl.int64)
    x = tl.load(v + b * in_b + key[:, None] * in_m + head * d + c[None, :], mask=(key < M)[:, None], other=0.0).to(tl.float32)
    x = saturated(x).to(out.dtype.element_ty)
    tl.store(out + b * out_b + (head * d + c).to(tl.int64)[:, None] * out_c + m[None, :], x.T, mask=(m < M)[None, :])


@triton.jit
def fused_cast_fp8(x, out, in_b, out_b, sample, BLOCK: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + b * in_b + at, mask=at < sample, other=0.0).to(tl.float32)
    tl.store(out + b * out_b + at, saturated(v).to(out.dtype.element_ty), mask=at < sample)


def codes(x_BMHd: torch.Tensor, out_BMHd: torch.Tensor | None = None) -> torch.Tensor:
    """e4m3 [B, M, H, d] of x, saturating, NaN kept, into `out_BMHd` if given. The samples of both are contiguous."""
    out = torch.empty(x_BMHd.shape, dtype=torch.float8_e4m3fn, device=x_BMHd.device) if out_BMHd is None else out_BMHd
    sample = x_BMHd[0].numel()
    fused_cast_fp8[(triton.cdiv(sample, 4096), len(x_BMHd))](x_BMHd, out, x_BMHd.stride(0), out.stride(0), sample, BLOCK=4096)
    return out


def transposed_codes(v_BMHd: torch.Tensor, out_BHdM: torch.Tensor | None = None) -> torch.Tensor:
    """e4m3 [B, H, d, M] of v, each 16 keys in the order of `key_order`, into `out_BHdM` if given.

    Heads and features of v are contiguous; `out_BHdM` may be a range of the keys, from a multiple of 16 on, of contiguous [B, H, d, all keys].
    """
    B, M, H, d = v_BMHd.shape
    out = torch.empty(B, H, d, M, dtype=torch.float8_e4m3fn, device=v_BMHd.device) if out_BHdM is None else out_BHdM
    steps = (v_BMHd.stride(0), v_BMHd.stride(1), out.stride(0), out.stride(2))
    fused_transpose_fp8[(triton.cdiv(M, 128), H, B)](v_BMHd, out, M, *steps, d=d, BM=128, num_warps=8)
    return out


def attention(q_BNHd: torch.Tensor, k_BMHd: torch.Tensor, v_BHdM: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v [B, N, H, d] in the dtype of q, which is contiguous and rounded to e4m3 here.

    `k_BMHd`, `v_BHdM`: what `codes` and `transposed_codes` give, or the first M keys of longer ones. d is 64 or 128.
    """
    if fused_roles(q_BNHd):
        from . import hopper_attention

        return hopper_attention.coded_attention(q_BNHd, k_BMHd, v_BHdM)
    B, N, H, d = q_BNHd.shape
    M = k_BMHd.shape[1]
    out = torch.empty_like(q_BNHd)
    k_step = k_BMHd.stride(0) // (H * d)
    q_rows = TensorDescriptor.from_tensor(codes(q_BNHd).view(B * N, H * d), [QUERIES, d])
    k_rows = TensorDescriptor.from_tensor(k_BMHd.as_strided(((B - 1) * k_step + M, H * d), (H * d, 1)), [KEYS, d])
    v_rows = TensorDescriptor.from_tensor(v_BHdM.as_strided((B * H * d, M), (v_BHdM.stride(2), 1)), [d, KEYS])
    fused_attention_fp8[(triton.cdiv(N, QUERIES), H, B)](
        q_rows, k_rows, v_rows, out, N, M, H, k_step, d**-0.5 * math.log2(math.e), d=d, BN=QUERIES, BM=KEYS, WHOLE=M % KEYS == 0, num_warps=4, num_stages=3
    )
    return out
