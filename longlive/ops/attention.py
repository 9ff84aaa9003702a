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
from .fp8 import to_e4m3
from .inference import fuses
from .triton_available import fused_fp8_tiles, fused_roles

Kernel = Callable[..., torch.Tensor]
# Fastest first at our shapes on Hopper (cuDNN reaches about twice the rate of the FlashAttention-2 class kernel).
CUDA_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
HEADS = (64, 128)  # features of a head that our kernels take
MANY_KEYS = 8192  # from so many on our kernel on Hopper is faster than cuDNN: level at 7040 keys, by a tenth at 28160


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


def hopper(q_BNHd: torch.Tensor, k_BMHd: torch.Tensor, v_BMHd: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`hopper_attention` in bfloat16 on Hopper, without bias and gradients; torch's attention elsewhere."""
    whole = all(t[0].is_contiguous() and (len(t) == 1 or t.stride(0)) for t in (k_BMHd, v_BMHd))  # the copy engine takes no stride of 0
    if bias is None and whole and fuses(q_BNHd, k_BMHd, v_BMHd) and fused_roles(q_BNHd) and q_BNHd.dtype == torch.bfloat16 and q_BNHd.shape[-1] in HEADS:
        from . import hopper_attention

        return hopper_attention.attention(q_BNHd.contiguous(), k_BMHd, v_BMHd)
    return (ordered_sdpa if q_BNHd.is_cuda else sdpa)(q_BNHd, k_BMHd, v_BMHd, bias)


def fp8(q_BNHd: torch.Tensor, k_BMHd: torch.Tensor, v_BMHd: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Both products in e4m3 where the GPU has them (`fp8_tiles_lack`); elsewhere attention of q, k and v rounded to e4m3.

    Queries and keys behind an RMS norm, and values, are of order one, well within e4m3, and need no scale. Without bias and gradients.
    """
    if bias is not None:
        raise ConfigError("attention in fp8 takes no bias; use another kernel where keys are masked")
    if fp8_fits(q_BNHd, k_BMHd, v_BMHd):
        from . import triton_attention

        return triton_attention.attention(q_BNHd.contiguous(), triton_attention.codes(k_BMHd), triton_attention.transposed_codes(v_BMHd))
    return sdpa(*(to_e4m3(t).to(t.dtype) for t in (q_BNHd, k_BMHd, v_BMHd)), None)


def fp8_fits(q_BNHd: torch.Tensor, k_BMHd: torch.Tensor, v_BMHd: torch.Tensor) -> bool:
    """Whether the FP8 kernel takes these tensors: heads of 64 or 128 features, keys in multiples of 16, every sample in one piece."""
    if not fuses(q_BNHd, k_BMHd, v_BMHd) or not fused_fp8_tiles(q_BNHd):
        return False
    return q_BNHd.shape[-1] in HEADS and k_BMHd.shape[1] % 16 == 0 and all(t[0].is_contiguous() for t in (k_BMHd, v_BMHd))


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "ordered": ordered_sdpa, "hopper": hopper, "math": math, "fp8": fp8}


def attention(
    q_BNHd: torch.Tensor, k_BMHd: torch.Tensor, v_BMHd: torch.Tensor, bias: torch.Tensor | None = None, *, kernel: str = "auto"
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + bias) v -> [B, N, H, d] in the dtype of q.

    `bias` broadcasts to [B, H, N, M]: float (added, in q's dtype) or bool (True = visible). `kernel` names an entry of `KERNELS`;
    "auto" takes "hopper" for unbiased attention to many keys in half precision on a GPU, "ordered" for such to fewer, and torch's own choice otherwise.
    """
    if kernel == "auto":
        half = q_BNHd.is_cuda and q_BNHd.dtype in (torch.bfloat16, torch.float16)
        kernel = "sdpa" if not half or bias is not None else "hopper" if k_BMHd.shape[1] >= MANY_KEYS else "ordered"
    if kernel not in KERNELS:
        raise ConfigError(f"unknown attention kernel {kernel!r}; use one of auto, {', '.join(KERNELS)}")
    return KERNELS[kernel](q_BNHd, k_BMHd, v_BMHd, bias)
