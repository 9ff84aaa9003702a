"""Attention whose two products run in FP8, with a running softmax in float32. (`attention.fp8` says when, and is the reference.)

A program takes a block of queries of one head through all keys. Weights within a block are exp2(logit - highest + 8), so that e4m3 holds them down to 2^-17
of the largest. Values come transposed, since the tensor cores read both operands of an FP8 product along the summed dimension.

`ROLES`: some warps fetch and others compute.

Legend: B batch, N queries, M keys, H heads, d head features.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .triton_rows import saturated

QUERIES, KEYS = 128, 128


@triton.jit
def fused_attention_fp8(
    q_rows, k_rows, v_rows, out, N, M, H, scale,
    d: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, WHOLE: tl.constexpr, ROLES: tl.constexpr,
):  # fmt: skip
    head, b = tl.program_id(1), tl.program_id(2)
    n = tl.program_id(0) * BN
    q = q_rows.load([b * N + n, head * d])
    highest = tl.full([BN], -1e30, dtype=tl.float32)
    weight = tl.zeros([BN], dtype=tl.float32)
    read = tl.zeros([BN, d], dtype=tl.float32)
    for m in tl.range(0, M, BM, warp_specialize=ROLES):
        logits = tl.dot(q, k_rows.load([b * M + m, head * d]).T)
        if not WHOLE:
            logits = tl.where((m + tl.arange(0, BM) < M)[None, :], logits, float("-inf"))
        now = tl.maximum(highest, tl.max(logits, 1) * scale)
        p = tl.exp2(logits * scale - (now - 8.0)[:, None])
        faded = tl.exp2(highest - now)
        weight = weight * faded + tl.sum(p, 1)
        read = read * faded[:, None]
        read = tl.dot(p.to(tl.float8e4nv), v_rows.load([(b * H + head) * d, m]).T, read)
        highest = now
    row = n + tl.arange(0, BN)
    place = ((b * N + row).to(tl.int64) * H + head)[:, None] * d + tl.arange(0, d)[None, :]
    tl.store(out + place, (read / weight[:, None]).to(out.dtype.element_ty), mask=(row < N)[:, None])


@triton.jit
def fused_transpose_fp8(v, out, M, stride_b, stride_m, H, d: tl.constexpr, BM: tl.constexpr):
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, d)
    x = tl.load(v + b * stride_b + m.to(tl.int64)[:, None] * stride_m + head * d + c[None, :], mask=(m < M)[:, None], other=0.0).to(tl.float32)
    x = saturated(x).to(out.dtype.element_ty)
    tl.store(out + ((b * H + head) * d + c)[:, None] * M + m[None, :], x.T, mask=(m < M)[None, :])


@triton.jit
def fused_cast_fp8(x, out, stride_b, sample, BLOCK: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + b * stride_b + at, mask=at < sample, other=0.0).to(tl.float32)
    tl.store(out + b * sample + at, saturated(v).to(out.dtype.element_ty), mask=at < sample)


def codes(x_BNHd: torch.Tensor) -> torch.Tensor:
    """e4m3 [B, N, H, d], contiguous, of x, whose samples are contiguous."""
    out = torch.empty(x_BNHd.shape, dtype=torch.float8_e4m3fn, device=x_BNHd.device)
    sample = x_BNHd[0].numel()
    fused_cast_fp8[(triton.cdiv(sample, 4096), len(x_BNHd))](x_BNHd, out, x_BNHd.stride(0), sample, BLOCK=4096)
    return out


def transposed_codes(v_BMHd: torch.Tensor) -> torch.Tensor:
    """e4m3 [B, H, d, M] of v [B, M, H, d], whose heads and features are contiguous."""
    B, M, H, d = v_BMHd.shape
    out = torch.empty(B, H, d, M, dtype=torch.float8_e4m3fn, device=v_BMHd.device)
    fused_transpose_fp8[(triton.cdiv(M, 64), H, B)](v_BMHd, out, M, v_BMHd.stride(0), v_BMHd.stride(1), H, d=d, BM=64)
    return out


def attention(q_BNHd: torch.Tensor, k_BMHd: torch.Tensor, v_BHdM: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v [B, N, H, d] in `dtype`; everything given is e4m3 and contiguous. M is a multiple of 16."""
    B, N, H, d = q_BNHd.shape
    M = k_BMHd.shape[1]
    out = torch.empty(B, N, H, d, dtype=dtype, device=q_BNHd.device)
    q_rows = TensorDescriptor.from_tensor(q_BNHd.view(B * N, H * d), [QUERIES, d])
    k_rows = TensorDescriptor.from_tensor(k_BMHd.view(B * M, H * d), [KEYS, d])
    v_rows = TensorDescriptor.from_tensor(v_BHdM.view(B * H * d, M), [d, KEYS])
    fused_attention_fp8[(triton.cdiv(N, QUERIES), H, B)](
        q_rows,
        k_rows,
        v_rows,
        out,
        N,
        M,
        H,
        d**-0.5 * math.log2(math.e),
        d=d,
        BN=QUERIES,
        BM=KEYS,
        WHOLE=M % KEYS == 0,
        ROLES=False,
        num_warps=8,
        num_stages=3,
    )
    return out
