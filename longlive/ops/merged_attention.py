"""Attention of a training sequence [clean film; noisy copy; ...] over its whole history, as dense calls that share keys instead of copying them.

A clean chunk sees clean chunks up to itself, a noisy one the clean chunks before it and itself (spec training §3.2).

Forward: one call per chunk for all streams, side by side in the batch, over one buffer of keys per stream in which a noisy stream's own chunk stands in
its place for as long as it is read. What is copied grows with the film, not with its square.
Backward: where keys come in parts, the gradient is the sum of the parts' gradients, each taken with the whole output and the whole log-sum-exp. So the own
chunks of all streams are one call, and what comes before a chunk is another, with all streams' queries in one row, so that its key
gradients arrive summed. They are collected in float32.

Kernels must return the log-sum-exp and take it back: cuDNN's and FlashAttention's operators in torch do; `math` is the same in plain torch, for any device.

Legend: B batch, S streams (clean first), C chunks, L tokens of a chunk, N = S C L, H heads, d head features, M keys of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..core.errors import ConfigError, InputError

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
LARGEST_HEAD = 128  # head features that cuDNN's backward takes on every card


class Read(NamedTuple):
    """What a forward leaves for the backward: `out_BNHd`, `lse` [B S, C, H, L] or [..., L, 1] float32 (as the kernel lays it out), and the kernel's seeds."""

    out_BNHd: torch.Tensor
    lse: torch.Tensor
    seed: torch.Tensor | None
    offset: torch.Tensor | None


class PartKernel(NamedTuple):
    """forward(q, k, v) -> (out, lse, seed, offset) and backward(grad, q, k, v, out, lse, seed, offset) -> (dq, dk, dv); tensors [B, H, N, d]."""

    forward: Callable[..., tuple]
    backward: Callable[..., Gradients]


def _math_logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.to(wide) @ k.to(wide).transpose(-2, -1) * q.shape[-1] ** -0.5


def _math_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple:
    logits = _math_logits(q, k)
    lse = logits.logsumexp(-1)
    return ((logits - lse.unsqueeze(-1)).exp() @ v.to(logits.dtype)).to(q.dtype), lse, None, None


def _math_backward(grad, q, k, v, out, lse, seed, offset) -> Gradients:
    logits = _math_logits(q, k)
    weights = (logits - lse.unsqueeze(-1)).exp()
    wide, scale = logits.dtype, q.shape[-1] ** -0.5
    gradient = grad.to(wide)
    inner = weights * (gradient @ v.to(wide).transpose(-2, -1) - (gradient * out.to(wide)).sum(-1, keepdim=True))
    dq, dk, dv = inner @ k.to(wide) * scale, inner.transpose(-2, -1) @ q.to(wide) * scale, weights.transpose(-2, -1) @ gradient
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _cudnn_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple:
    out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)
    return out, lse, seed, offset


def _cudnn_backward(grad, q, k, v, out, lse, seed, offset) -> Gradients:
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    return backward(grad, q, k, v, out, lse, seed, offset, None, None, None, q.shape[2], k.shape[2], 0.0, False)


def _flash_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple:
    out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)
    return out, lse, seed, offset


def _flash_backward(grad, q, k, v, out, lse, seed, offset) -> Gradients:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return backward(grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, seed, offset)


PART_KERNELS = {
    "cudnn": PartKernel(_cudnn_forward, _cudnn_backward),
    "flash": PartKernel(_flash_forward, _flash_backward),
    "math": PartKernel(_math_forward, _math_backward),
}


def part_kernel(q_BNHd: torch.Tensor) -> str | None:
    """The fastest entry of `PART_KERNELS` for such queries: half precision on a GPU of the last generations. None: none pays."""
    half = q_BNHd.is_cuda and q_BNHd.dtype in (torch.bfloat16, torch.float16)
    if not half or q_BNHd.shape[-1] > LARGEST_HEAD or q_BNHd.shape[-1] % 8:
        return None
    generation = torch.cuda.get_device_capability(q_BNHd.device)[0]
    if generation >= 9 and torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled():
        return "cudnn"
    return "flash" if generation >= 8 and torch.backends.cuda.is_flash_attention_available() else None


def film_attention(
    q_BNHd: torch.Tensor, k_BNHd: torch.Tensor, v_BNHd: torch.Tensor, *, streams: int, chunks: int, kernel: str, read: Read | None = None
) -> tuple[torch.Tensor, Read]:
    """What all tokens of `streams` streams of `chunks` equal chunks read -> ([B, N, H, d] in the dtype of q, what a recomputation may reuse).

    q, k, v are rotated and of one dtype. `kernel` is an entry of `PART_KERNELS`. `read`: what an earlier call with the same q, k, v returned; nothing is
    computed then, and gradients flow as if it had been. Raises InputError for tokens that are not equal chunks.
    """
    if kernel not in PART_KERNELS:
        raise ConfigError(f"unknown attention kernel {kernel!r}; use one of {', '.join(PART_KERNELS)}")
    if q_BNHd.shape[1] % (streams * chunks) or k_BNHd.shape[1] != q_BNHd.shape[1]:
        raise InputError(f"queries({q_BNHd.shape[1]}) and keys({k_BNHd.shape[1]}) must both be {streams} streams x {chunks} chunks of equally many tokens")
    out, *rest = _FilmAttention.apply(q_BNHd, k_BNHd, v_BNHd, streams, chunks, kernel, read)
    return out, Read(out.detach(), *rest)


class _FilmAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, streams, chunks, kernel, read):
        given = read
        if read is None:
            read = _forward(PART_KERNELS[kernel], q, k, v, streams, chunks)
        out = read.out_BNHd if given is None else read.out_BNHd.view_as(read.out_BNHd)
        ctx.streams, ctx.chunks, ctx.kernel = streams, chunks, kernel
        ctx.save_for_backward(q, k, v, out, read.lse, read.seed, read.offset)
        ctx.mark_non_differentiable(*(t for t in read[1:] if t is not None))
        return (out, *read[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        q, k, v, *read = ctx.saved_tensors
        return *_backward(PART_KERNELS[ctx.kernel], grad.contiguous(), q, k, v, Read(*read), ctx.streams, ctx.chunks), None, None, None, None


def _forward(kernel: PartKernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, streams: int, chunks: int) -> Read:
    size = q.shape[1] // (streams * chunks)
    queries = q.unflatten(1, (streams, chunks, size)).flatten(0, 1)
    # [B, S, C L, H, d]: behind the chunk that is read now, every stream has its own chunks; before it, the clean ones
    buffers = [t.unflatten(1, (streams, -1)).clone(memory_format=torch.contiguous_format) for t in (k, v)]
    out = q.new_empty(q.shape)
    places, lses, seeds = out.unflatten(1, (streams, chunks, size)).flatten(0, 1), [], (None, None)
    for chunk in range(chunks):
        start, stop = chunk * size, (chunk + 1) * size
        keys, values = (t[:, :, :stop].flatten(0, 1).transpose(1, 2) for t in buffers)
        part, lse, *seeds = kernel.forward(queries[:, chunk].transpose(1, 2), keys, values)
        places[:, chunk] = part.transpose(1, 2)
        lses.append(lse)
        for buffer in buffers:
            buffer[:, 1:, start:stop] = buffer[:, :1, start:stop]
    return Read(out, torch.stack(lses, 1), *seeds)


def _backward(
    kernel: PartKernel, grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, read: Read, streams: int, chunks: int
) -> Gradients:
    batch, size = q.shape[0], q.shape[1] // (streams * chunks)
    grid = (batch, streams, chunks)
    every = [t.reshape(-1, size, *t.shape[2:]).transpose(1, 2) for t in (grad, q, k, v, read.out_BNHd)]
    dq, dk, dv = (t.transpose(1, 2).unflatten(0, grid) for t in kernel.backward(*every, read.lse.flatten(0, 1), *read[2:]))
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = [t[:, 0].flatten(1, 2).to(wide, copy=True) for t in (dk, dv)]  # [B, C L, H, d] of the clean stream
    rows = [t.unflatten(1, (streams, chunks, size)) for t in (grad, q, read.out_BNHd)]
    lse = read.lse.unflatten(0, (batch, streams))
    for chunk in range(1, chunks):
        before = chunk * size
        g, queries, out = (t[:, :, chunk].flatten(1, 2).transpose(1, 2) for t in rows)
        keys, values = (t[:, :before].transpose(1, 2) for t in (k, v))
        together = lse[:, :, chunk].transpose(1, 2).flatten(2, 3)
        dq_part, *dkv_part = kernel.backward(g, queries, keys, values, out, together, *read[2:])
        dq[:, :, chunk] += dq_part.transpose(1, 2).unflatten(1, (streams, size))
        for total, part in zip(sums, dkv_part):
            total[:, :before] += part.transpose(1, 2)
    for own, total in zip((dk, dv), sums):
        own[:, 0] = total.unflatten(1, (chunks, size))
    return tuple(t.reshape(q.shape) for t in (dq, dk, dv))
