"""Cross-attention to prompts: every group of queries reads the keys and values of one prompt, each key with a bias.

Legend: B batch, G groups of consecutive queries that share a prompt, N queries of a group, R rows (prompts) of M keys, H heads, d head features.
"""

from __future__ import annotations

import torch

from .attention import attention
from .inference import fuses
from .triton_available import fused_copies

HEADS = (16, 32, 64, 128, 256)  # features that the kernel takes


def text_attention(q_GNHd: torch.Tensor, k_RMHd: torch.Tensor, v_RMHd: torch.Tensor, bias_RM: torch.Tensor, rows_G: torch.Tensor) -> torch.Tensor:
    """[G, N, H, d] in q's dtype, G groups of the whole batch. `rows_G` int64 names a row for each; `bias_RM` float, with a finite value in each row."""
    k_RMHd, v_RMHd = k_RMHd.to(q_GNHd.dtype), v_RMHd.to(q_GNHd.dtype)
    half = q_GNHd.dtype in (torch.bfloat16, torch.float16)
    if half and q_GNHd.shape[-1] in HEADS and fuses(q_GNHd, k_RMHd, v_RMHd) and fused_copies(q_GNHd):
        from . import triton_text

        return triton_text.text_attention(q_GNHd, k_RMHd, v_RMHd, bias_RM, rows_G)
    k, v, bias = (t.index_select(0, rows_G) for t in (k_RMHd, v_RMHd, bias_RM))
    return attention(q_GNHd, k, v, bias.to(q_GNHd.dtype)[:, None, None, :])
