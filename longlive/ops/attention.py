"""Scaled dot-product attention behind one signature, with a small table of kernels.

A new kernel is a new entry of `KERNELS`; nothing else learns of it. `math` is the oracle that the others are tested against.

Legend: B batch, N queries, M keys, H heads, d head features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.errors import ConfigError

Kernel = Callable[..., torch.Tensor]
# Fastest first at our shapes on Hopper (cuDNN reaches about twice the rate of the FlashAttention-2 class kernel).
CUDA_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa(q_BNHd: torch.Tensor, k_BMHd: torch.Tensor, v_BMHd: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch's own attention, as it chooses."""
    q, k, v = (t.transpose(1, 2) for t in (q_BNHd, k_BMHd, v_BMHd))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def ordered_sdpa(q_BNHd: torch.Tensor, k_BMHd: torch.Tensor, v_BMHd: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch's attention with the backends tried in `CUDA_ORDER`."""
    with sdpa_kernel(CUDA_ORDER, set_priority=True):
        return sdpa(q_BNHd, k_BMHd, v_BMHd, bias)


def math(q_BNHd: torch.Tensor, k_BMHd: torch.Tensor, v_BMHd: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The definition, with the softmax in at least float32."""
    wide = torch.promote_types(q_BNHd.dtype, torch.float32)
    logits = torch.einsum("bnhd,bmhd->bhnm", q_BNHd.to(wide), k_BMHd.to(wide)) * q_BNHd.shape[-1] ** -0.5
    if bias is not None:
        logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v_BMHd.to(wide)).to(q_BNHd.dtype)


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "ordered": ordered_sdpa, "math": math}


def attention(
    q_BNHd: torch.Tensor, k_BMHd: torch.Tensor, v_BMHd: torch.Tensor, bias: torch.Tensor | None = None, *, kernel: str = "auto"
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + bias) v -> [B, N, H, d] in the dtype of q.

    `bias` broadcasts to [B, H, N, M]: float (added, in q's dtype) or bool (True = visible). `kernel` names an entry of `KERNELS`;
    "auto" takes the ordered backends for unbiased attention in half precision on a GPU and torch's own choice otherwise.
    """
    if kernel == "auto":
        half = q_BNHd.is_cuda and q_BNHd.dtype in (torch.bfloat16, torch.float16)
        kernel = "ordered" if half and bias is None else "sdpa"
    if kernel not in KERNELS:
        raise ConfigError(f"unknown attention kernel {kernel!r}; use one of auto, {', '.join(KERNELS)}")
    return KERNELS[kernel](q_BNHd, k_BMHd, v_BMHd, bias)
