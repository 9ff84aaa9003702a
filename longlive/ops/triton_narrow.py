"""A 3x3x3 convolution to a few channels, as a matrix product over columns and a sum over frames and rows. (`conv_narrow` says when.)

Twelve outputs fill a tenth of a tensor core's tile. Nine taps (t, h) of them fill it: every position is multiplied with all nine at once, only the three
columns are summed in the product; the copy engine gives zeros left and right of the frame. What comes out lies in float32 in a ring of frames, so that no frame
is multiplied twice and the memory is bounded; a second pass adds the nine up.

Legend: T output frames, H W rows and columns in, HO rows out, C channels in, O or OUT out, N = 9 O.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

RING_BYTES = 640 * 2**20
BM, BN, BK = 128, 128, 64
BLOCK = 512


@triton.jit(do_not_specialize=["first", "slots"])
def fused_narrow_convolution(
    x_tiles, w_rows, out, first, H, W, slots,
    C: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(W, BM)
    row, column = first + tl.program_id(0) // across, tl.program_id(0) % across * BM
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(3 * (C // BK)):
        tap, c = k // (C // BK), k % (C // BK) * BK
        acc = tl.dot(x_tiles.load([row, column + tap - 1, c]).reshape(BM, BK), w_rows.load([tap * BN, c]).T, acc)
    w, n = column + tl.arange(0, BM), tl.arange(0, BN)
    place = ((row // H % slots).to(tl.int64) * H + row % H) * W + w
    tl.store(out + place[:, None] * N + n[None, :], acc, mask=(w < W)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["first", "slots"])
def fused_sum_taps(y, out, first, slots, H, W, HO, pad, OUT: tl.constexpr, BLOCK: tl.constexpr):
    t = first + tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < HO * W * OUT
    o, position = at % OUT, at // OUT
    h, w = position // W, position % W
    v = tl.zeros([BLOCK], dtype=tl.float32)
    for dt in tl.static_range(3):
        frame = y + ((t + dt) % slots).to(tl.int64) * H * W * (9 * OUT)
        for dh in tl.static_range(3):
            row = h + dh - pad
            v += tl.load(frame + (row * W + w) * (9 * OUT) + (3 * dt + dh) * OUT + o, mask=inside & (row >= 0) & (row < H), other=0.0)
    tl.store(out + t.to(tl.int64) * (HO * W * OUT) + at, v.to(out.dtype.element_ty), mask=inside)


def convolution(x_BTHWC: torch.Tensor, rows: torch.Tensor, outputs: int, pad: int) -> torch.Tensor:
    """[B, T, H - 2 + 2 pad, W, O] from x [B, T + 2, H, W, C] and `conv_narrow.tap_rows` [3 * 128, C]."""
    x = x_BTHWC.contiguous()
    B, frames, H, W, C = x.shape
    T, HO, N = frames - 2, H - 2 + 2 * pad, 9 * outputs
    slots = min(frames, max(3, RING_BYTES // (4 * N * H * W)))
    ring = torch.empty(slots, H, W, N, dtype=torch.float32, device=x.device)
    out = x.new_empty(B, T, HO, W, outputs)
    w_rows = TensorDescriptor.from_tensor(rows, [BN, BK])
    for b in range(B):
        x_tiles, done = TensorDescriptor.from_tensor(x[b].flatten(0, 1), [1, BM, BK]), 0
        for first in range(0, T, slots - 2):
            last = min(T, first + slots - 2)
            fused_narrow_convolution[((last + 2 - done) * H * triton.cdiv(W, BM),)](
                x_tiles, w_rows, ring, done * H, H, W, slots, C=C, N=N, BM=BM, BN=BN, BK=BK, num_warps=4, num_stages=3
            )
            done = last + 2
            fused_sum_taps[(triton.cdiv(HO * W * outputs, BLOCK), last - first)](ring, out[b], first, slots, H, W, HO, pad, OUT=outputs, BLOCK=BLOCK)
    return out
