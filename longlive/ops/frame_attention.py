"""Attention of one wide head among the positions of a frame.

The VAE's head has 512 or 1024 channels, beyond what fused attention takes (256). On a GPU, in half precision and without gradients, it is two batched products
with the scores between them in float32; elsewhere torch's own.

Legend: N frames, S positions of a frame, C channels of the head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .inference import unrecorded

WIDEST_FUSED = 256
SCORES = 2**28  # float32 scores at once: 1 GiB


def frame_attention(q_NSC: Tensor, k_NSC: Tensor, v_NSC: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v, [N, S, C]."""
    half = q_NSC.dtype in (torch.bfloat16, torch.float16)
    if not (q_NSC.is_cuda and half and q_NSC.shape[-1] > WIDEST_FUSED and unrecorded(q_NSC, k_NSC, v_NSC)):
        return F.scaled_dot_product_attention(q_NSC.unsqueeze(1), k_NSC.unsqueeze(1), v_NSC.unsqueeze(1)).squeeze(1)
    out, frames = torch.empty_like(v_NSC, memory_format=torch.contiguous_format), max(1, SCORES // q_NSC.shape[1] ** 2)
    for at in range(0, len(out), frames):
        two_products(q_NSC[at : at + frames], k_NSC[at : at + frames], v_NSC[at : at + frames], out[at : at + frames])
    return out


def two_products(q_NSC: Tensor, k_NSC: Tensor, v_NSC: Tensor, out_NSC: Tensor) -> None:
    """The same into `out`, with all scores in memory, in float32; the weights are rounded to the dtype of v."""
    scores = torch.bmm(q_NSC, k_NSC.mT, out_dtype=torch.float32)
    weights = scores.mul_(q_NSC.shape[-1] ** -0.5).softmax(-1)
    torch.bmm(weights.to(v_NSC.dtype), v_NSC, out=out_NSC)
