"""Attention in FP8 from codes that are kept: every key and value is rounded to e4m3 once, when it is written, and goes to where it is read.

Values lie along the keys, since the tensor cores read both operands of an FP8 product along the dimension that they sum over, each sixteen keys in the order
in which a thread holds their weights (`triton_attention.key_order`). Nothing is scaled: queries and keys behind an RMS norm, and values, are of order one.

Legend: B batch, N tokens, H heads, d head features, P pages (slots) of N tokens, M keys.
"""

from __future__ import annotations

import torch

from .attention import HEADS, attention
from .fp8 import to_e4m3
from .heads import Heads, Tables, writes_fused
from .rope import apply_rope
from .triton_available import fp8_tiles_lack

SIXTEEN = (2, 4, 2)  # keys, as (half, pair, one of two); they stand pair first


def keeps_codes(device: torch.device, page_tokens: int, head_dim: int) -> bool:
    """Whether pages of so many tokens can be kept as codes: on a GPU whose kernel reads them, in whole groups of sixteen."""
    return device.type == "cuda" and fp8_tiles_lack(device) is None and head_dim in HEADS and page_tokens % 16 == 0


def value_codes(v_BMHd: torch.Tensor) -> torch.Tensor:
    """e4m3 [B, H, d, M] of values [B, M, H, d], in the order in which they are read; M is a multiple of 16."""
    bits = to_e4m3(v_BMHd).view(torch.uint8).permute(0, 2, 3, 1)
    return bits.unflatten(-1, (-1, *SIXTEEN)).transpose(-3, -2).flatten(-4).view(torch.float8_e4m3fn)


def value_rows(v_BHdM: torch.Tensor) -> torch.Tensor:
    """The way back: e4m3 [B, M, H, d]."""
    half, pair, one = SIXTEEN
    return v_BHdM.view(torch.uint8).unflatten(-1, (-1, pair, half, one)).transpose(-3, -2).flatten(-4).permute(0, 3, 1, 2).view(torch.float8_e4m3fn)


def write_codes(k_BNHd: torch.Tensor, v_BNHd: torch.Tensor, slot_B: torch.Tensor, k_BPNHd: torch.Tensor, v_BHdM: torch.Tensor) -> None:
    """Codes of k and v into slot `slot_B[b]` of e4m3 pages: of keys [B, P, N, H, d], and of values [B, H, d, P N]."""
    rows = torch.arange(len(slot_B), device=slot_B.device)
    if keeps_codes(k_BNHd.device, *k_BNHd.shape[1::2]):
        from . import triton_attention, triton_heads

        k_BPNHd.view(torch.uint8)[rows, slot_B] = triton_attention.codes(k_BNHd.contiguous()).view(torch.uint8)
        return triton_heads.write_values(v_BNHd.flatten(2), slot_B, v_BHdM)
    k_BPNHd.view(torch.uint8)[rows, slot_B] = to_e4m3(k_BNHd).view(torch.uint8)
    v_BHdM.view(torch.uint8).unflatten(-1, (-1, v_BNHd.shape[1]))[rows, :, :, slot_B] = value_codes(v_BNHd).view(torch.uint8)


def norm_rope_code(heads: Heads, tables: Tables, slot_B: torch.Tensor, k_BPNHd: torch.Tensor, v_BHdM: torch.Tensor) -> torch.Tensor | None:
    """Normalises and rotates q and k, and writes the codes of k and v as `write_codes` does; returns q [B, N, H, d] (None without q).

    `tables`: cosines and sines of the tokens, [B or 1, N, d / 2]. No gradient passes.
    """
    if writes_fused(heads, k_BPNHd) and v_BHdM.is_contiguous():
        from . import triton_heads

        weights = (heads.weight_q, heads.weight_k)
        return triton_heads.norm_rope_code(heads.q_BND, heads.k_BND, heads.v_BND, weights, heads.eps, tables, slot_B, (k_BPNHd, v_BHdM))
    with torch.no_grad():
        q, k, v = heads.normalised()
        write_codes(apply_rope(k, *tables), v, slot_B, k_BPNHd, v_BHdM)
        return None if q is None else apply_rope(q, *tables)


def coded_attention(q_BNHd: torch.Tensor, k_BMHd: torch.Tensor, v_BHdM: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v -> [B, N, H, d] in the dtype of q, with q rounded to e4m3 too; without gradients."""
    if keeps_codes(q_BNHd.device, k_BMHd.shape[1], q_BNHd.shape[-1]):
        from . import triton_attention

        return triton_attention.attention(q_BNHd.contiguous(), k_BMHd, v_BHdM)
    return attention(q_BNHd, k_BMHd.to(q_BNHd.dtype), value_rows(v_BHdM).to(q_BNHd.dtype), kernel="fp8")
